import { SupportChat } from './support-chat'

/** Rendered on the server, at the time of the request: where Trunkline is, is its environment's to say. */
export const dynamic = 'force-dynamic'

export default function Page() {
  const { TRUNKLINE_URL = 'http://127.0.0.1:4800', TRUNKLINE_AGENT_ID = '' } = process.env
  return (
    <main>
      <h1>Support</h1>
      <SupportChat baseUrl={TRUNKLINE_URL} agentId={TRUNKLINE_AGENT_ID} tokenUrl="/api/trunkline/jwt" />
    </main>
  )
}
