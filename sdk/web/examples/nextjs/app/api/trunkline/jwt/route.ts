import { SignJWT } from 'jose'
import { cookies } from 'next/headers'

/** Signs a token for the user who is signed in. The app's secret never leaves the server. */
export async function GET() {
  const { TRUNKLINE_APP_KEY, TRUNKLINE_APP_SECRET, TRUNKLINE_AGENT_ID } = process.env
  if (!TRUNKLINE_APP_KEY || !TRUNKLINE_APP_SECRET || !TRUNKLINE_AGENT_ID) throw new Error('TRUNKLINE_… is not set')
  // Your own way to know the user: anyone can set this cookie. An opaque id, and no e-mail address.
  const user = (await cookies()).get('user')?.value
  if (!user) return new Response('unauthorized', { status: 401 })
  const claims = { company_api_key: TRUNKLINE_APP_KEY, agent_uuid: TRUNKLINE_AGENT_ID, source_key: user }
  const token = await new SignJWT(claims)
    .setProtectedHeader({ alg: 'HS256' })
    .setIssuer(TRUNKLINE_APP_KEY)
    .setAudience('valet-sdk')
    .setIssuedAt()
    .setExpirationTime('15m')
    .sign(new TextEncoder().encode(TRUNKLINE_APP_SECRET))
  return new Response(token)
}
