/**
 * A name that nothing else has, and no secret. Random, also where `crypto.randomUUID` is not (on pages without TLS), and where there is no
 * `crypto` at all (React Native).
 */
export function newKey(): string {
  const bytes = new Uint8Array(16)
  if (typeof crypto === 'undefined') bytes.forEach((_, at) => (bytes[at] = Math.floor(Math.random() * 256)))
  else crypto.getRandomValues(bytes)
  return [...bytes].map((byte) => byte.toString(16).padStart(2, '0')).join('')
}
