/**
 * Colours are custom properties, so that pages set their own; directions are those of the text. Edges of what can be used have 3:1, text
 * has 4.5:1 (WCAG 1.4.3, 1.4.11); targets are 44 px, and text is 16 px, below which iOS zooms the page.
 */
export const STYLE = `
:host { --accent: #3b5bdb; --on-accent: #fff; --back: #fff; --text: #1b1f24; --dim: #57606a; --own: #e7ecff; --other: #f1f3f5;
  --line: #d8dee4; --edge: #7d8590; --bad: #b42318; display: block; color-scheme: light; font: 16px/1.45 system-ui, sans-serif; }
:host([hidden]) { display: none; }
@media (prefers-color-scheme: dark) { :host(:not([theme=light])) { --accent: #8da2fb; --on-accent: #10131a; --back: #14171c;
  --text: #e6e9ee; --dim: #9aa4b2; --own: #26305a; --other: #22262e; --line: #333a45; --edge: #7d8590; --bad: #ff8a7a; color-scheme: dark; } }
:host([theme=dark]) { --accent: #8da2fb; --on-accent: #10131a; --back: #14171c; --text: #e6e9ee; --dim: #9aa4b2; --own: #26305a;
  --other: #22262e; --line: #333a45; --edge: #7d8590; --bad: #ff8a7a; color-scheme: dark; }
* { box-sizing: border-box; }
.frame { display: flex; flex-direction: column; block-size: 100%; min-block-size: 16rem; background: var(--back); color: var(--text);
  border: 1px solid var(--line); border-radius: 12px; overflow: hidden; }
header { display: flex; align-items: center; gap: .5rem; padding: .6rem .9rem; border-block-end: 1px solid var(--line); }
h2 { font-size: 1rem; margin: 0; flex: 1; }
.status { color: var(--dim); font-size: .85rem; }
.middle { flex: 1; min-block-size: 0; position: relative; display: flex; }
.log { flex: 1; overflow-y: auto; padding: .9rem; display: flex; flex-direction: column; gap: .25rem; overscroll-behavior: contain; }
.log:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
button:focus-visible, textarea:focus-visible, a:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
.jump { position: absolute; inset-block-end: .5rem; inset-inline: 0; margin-inline: auto; inline-size: fit-content;
  box-shadow: 0 1px 6px #0004; }
.message { max-inline-size: 85%; align-self: flex-start; display: grid; gap: .15rem; padding-inline-start: 2.5rem; position: relative; }
.message[data-from=appuser] { align-self: flex-end; padding-inline-start: 0; }
.message[data-begins]:not(:first-of-type) { margin-block-start: .35rem; }
.message:not([data-begins]) .face, .message:not([data-ends]):not([data-pending]) .meta { display: none; }
.face { position: absolute; inset-block-start: 0; inset-inline-start: 0; inline-size: 2rem; block-size: 2rem; border-radius: 50%;
  overflow: hidden; display: grid; place-items: center; background: var(--other); color: var(--dim); font-size: .85rem; font-weight: 600; }
.face img { position: absolute; inset: 0; inline-size: 100%; block-size: 100%; object-fit: cover; }
.bubble { background: var(--other); border-radius: 12px; padding: .5rem .75rem; overflow-wrap: anywhere; border: 1px solid transparent; }
.message[data-from=appuser] .bubble { background: var(--own); white-space: pre-wrap; }
.bubble > * { margin-block: 0 .5rem; } .bubble > :last-child { margin-block-end: 0; }
.bubble ul:not(.files), .bubble ol { padding-inline-start: 1.3rem; }
.bubble pre { overflow-x: auto; padding: .5rem; border: 1px solid var(--line); border-radius: 8px; background: var(--back); }
.bubble code { font: .9em ui-monospace, monospace; }
.bubble blockquote { margin-inline: 0; padding-inline-start: .7rem; border-inline-start: 3px solid var(--line); }
.message[data-partial] .bubble::after { content: '▍'; color: var(--accent); animation: blink 1s steps(2) infinite; }
.message[data-pending] .bubble { opacity: .75; }
.meta { font-size: .75rem; color: var(--dim); padding-inline: .3rem; }
.message[data-from=appuser] .meta { text-align: end; }
.note { color: var(--dim); font-size: .85rem; text-align: center; margin: .4rem auto; }
.files { display: flex; flex-wrap: wrap; gap: .4rem; list-style: none; margin: .3rem 0 0; padding: 0; }
.files img { max-inline-size: 12rem; max-block-size: 9rem; border-radius: 8px; display: block; }
a { color: var(--accent); }
.typing { color: var(--dim); font-size: .85rem; min-block-size: 1.3em; padding-inline: .9rem; }
.notice { padding: .6rem .9rem; border-block-start: 1px solid var(--line); color: var(--dim); display: flex; gap: .6rem; align-items: center; }
.error { color: var(--bad); padding: 0 .9rem .4rem; font-size: .85rem; }
form { display: flex; gap: .4rem; align-items: flex-end; padding: .6rem; border-block-start: 1px solid var(--line); }
textarea { flex: 1; min-inline-size: 0; resize: none; font: inherit; color: inherit; background: transparent; border: 1px solid var(--edge);
  border-radius: 10px; padding: .55rem .7rem; max-block-size: 9rem; min-block-size: 2.75rem; }
textarea::placeholder { color: var(--dim); opacity: 1; }
button { font: inherit; border: 1px solid transparent; border-radius: 10px; padding: .5rem .9rem; min-block-size: 2.75rem;
  min-inline-size: 2.75rem; cursor: pointer; background: var(--accent); color: var(--on-accent); }
button.plain { background: transparent; color: var(--accent); padding-inline: .6rem; }
button:disabled { opacity: .5; cursor: default; }
.drafts { display: flex; flex-wrap: wrap; gap: .3rem; padding: .4rem .6rem 0; list-style: none; margin: 0; font-size: .85rem; }
.drafts li { border: 1px solid var(--line); border-radius: 8px; padding-inline-start: .5rem; display: flex; align-items: center; }
.drafts button { padding: 0; }
.hidden { position: absolute; inline-size: 1px; block-size: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
[hidden] { display: none !important; }
@keyframes blink { to { opacity: 0; } }
@media (prefers-reduced-motion: reduce) { .bubble::after { animation: none !important; } }
@media (forced-colors: active) { .bubble, button, .face, .drafts li { border: 1px solid; } .message[data-from=appuser] .bubble { border-width: 2px; } }
`
