//! What an agent, a task, a conversation and a sandbox *is*, and who may do what. Plain data and decisions: no sockets,
//! no wire types, no SQL drivers.
//!
//! A request enters with a [`caller::Caller`], asks the [`gate`] for a permit, and does with it what a slice
//! ([`message`], [`session`], [`checkpoint`]) says.

pub mod app;
pub mod audit;
pub mod caller;
pub mod checkpoint;
pub mod conversation;
mod due;
pub mod error;
pub mod gate;
pub mod identity;
pub mod json;
pub mod kv;
pub mod limits;
pub mod message;
pub mod presence;
pub mod registry;
pub mod rule;
pub mod sandbox;
pub mod session;
pub mod socket;
pub mod task;
pub mod token;
pub mod topic;
pub mod work;
pub mod workspace;

use trunkline_store::ledger::Migration;

pub use error::{Error, Kind};

/// The ledger's schema, slice by slice, in the order in which it grew.
#[must_use]
pub fn migrations() -> Vec<Migration> {
    [
        session::MIGRATIONS,
        checkpoint::MIGRATIONS,
        rule::sql::MIGRATIONS,
        kv::MIGRATIONS,
        token::MIGRATIONS,
        workspace::MIGRATIONS,
        audit::MIGRATIONS,
        registry::MIGRATIONS,
        task::MIGRATIONS,
        sandbox::MIGRATIONS,
        socket::MIGRATIONS,
        app::MIGRATIONS,
        conversation::MIGRATIONS,
    ]
    .concat()
}
