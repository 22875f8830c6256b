//! The agent-socket protocol, version 1: a UI and a long-running runtime stay in step, over whatever carries text both ways.
//!
//! Every event has a number in its client's stream and is kept before it is sent, so that whoever was away gets what it
//! missed, once and in order; a turn that is begun twice runs once; a runtime that was started again says so, and says what
//! was lost. docs/protocol/agent-socket.md is the whole of it.
//!
//! - [`envelope`]: what is said. [`parse`], [`make`] and [`serialize`] need nothing else.
//! - [`state`] and [`stale`]: how the runtime is, folded from events, and whether a UI still shows that.
//! - [`store`]: where events are kept.
//! - [`link`]: the server's side of a socket without the socket.
//! - `server` and `client` (feature `tokio`): both sides, over any `transport`; `runtime` serves clients of a server elsewhere.
//!
//! ```
//! use trunkline_agent_socket::{Meta, Type, make, parse, serialize};
//!
//! let envelope = make(Type::TurnPhase, &serde_json::json!({"phase": "planning"}), Meta::turn("t-1"))?;
//! assert_eq!(parse(serialize(&envelope).as_bytes())?, envelope);
//! let error = parse(br#"{"protocol":"agent-socket","version":1,"type":"turn_start","ts":1,"seq":-1}"#).unwrap_err();
//! assert_eq!(error.to_string(), "seq: no whole number from 0 to 2^53-1");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#[cfg(feature = "tokio")]
pub mod client;
pub mod close;
pub mod envelope;
pub mod link;
#[cfg(feature = "tokio")]
pub mod runtime;
#[cfg(feature = "tokio")]
pub mod server;
pub mod stale;
pub mod state;
pub mod store;
#[cfg(feature = "tokio")]
pub mod transport;

pub use self::{
    close::Close,
    envelope::{Envelope, Meta, PROTOCOL, ParseError, Type, VERSION, make, parse, serialize},
    stale::{LocalUiState, StaleAction, StaleReason, StaleUi, detect_stale_ui, should_clear_thinking},
    state::{RuntimeState, ToolState, ToolStatus, TurnState, TurnStatus},
};
