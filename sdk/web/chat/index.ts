/** The chat as an element of the page. Importing it defines `<trunkline-chat>`. */

import { define } from './element.js'

export { TrunklineChat, define } from './element.js'
export { ENGLISH, type Strings } from './strings.js'

define()
