import type { NextConfig } from 'next'
import { join } from 'node:path'

const config: NextConfig = {
  // The component is beside this directory.
  turbopack: { root: join(import.meta.dirname, '../..') },
}

export default config
