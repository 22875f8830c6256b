/** For a script tag: everything of a chat under `Trunkline`. */

export * from '../conversation/index.js'
export * from './index.js'
