import type { ReactNode } from 'react'

export const metadata = { title: 'Trunkline: a conversation in a Next.js app' }

export default function Layout({ children }: { children: ReactNode }) {
  return (
    <html lang="en">
      <body>{children}</body>
    </html>
  )
}
