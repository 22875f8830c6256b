//! The agent-socket protocol, usable without the server. Nothing is here yet: the crate holds the place that ARCHITECTURE.md gives it.
