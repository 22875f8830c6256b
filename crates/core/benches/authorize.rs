//! What a decision of the gate costs: whether a caller may send to a target, with more and more rules.
//!
//! Run by `cargo xtask bench core`.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "bench code")]

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use trunkline_core::{
    caller::{Caller, Credential},
    gate::{
        Gate, Send,
        rules::{Level, Name},
    },
    identity::Identity,
    rule::{self, Grant},
    topic::Target,
};
use trunkline_store::{Durability, Options, Store, ledger, log};

/// How long each row is measured.
const MEASURE: Duration = Duration::from_secs(1);

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        migrations: trunkline_core::migrations(),
        log: log::Options { durability: Durability::Process, ..log::Options::default() },
        ledger: ledger::Options { durability: Durability::Process, ..ledger::Options::default() },
        ..Options::default()
    };
    let store = Store::open(dir.path(), options).unwrap();
    let gate = Gate::open(store.clone()).await.unwrap();
    let admin = caller(Identity::orchestrator("bench", "admin").unwrap());
    let one = caller(Identity::agent("team-7", "bot", "a").unwrap());
    let target = Target::parse("ag::team-7::bot::b").unwrap();
    println!("{:>8} {:>10} {:>14}", "rules", "patterns", "a decision");
    let (mut plain, mut patterns) = (0, 0);
    for (plain_to, patterns_to) in [(0, 0), (1000, 0), (1000, 100), (1000, 400), (10_000, 400)] {
        for n in plain..plain_to {
            put(&gate, &admin, format!("ag::w{n}::bot::a"), format!("w{n}")).await;
        }
        for n in patterns..patterns_to {
            put(&gate, &admin, format!("ag::team-{n}::bot::a*"), format!("team-{n}")).await;
        }
        (plain, patterns) = (plain_to, patterns_to);
        println!("{plain:>8} {patterns:>10} {:>11} ns", measure(&gate, &one, &target).as_nanos());
    }
    store.stop().await;
}

fn caller(identity: Identity) -> Caller {
    Caller::new(identity, "session".to_owned(), Credential::none(true))
}

async fn put(gate: &Gate, admin: &Caller, principal: String, workspace: String) {
    let grant = Grant {
        principal: Name::new("agent", principal),
        resource: Name::new("workspace", workspace),
        level: Level::READ_WRITE,
        expires_at: None,
        reason: String::new(),
        granted_by: String::new(),
    };
    rule::grant(gate, admin, grant).await.unwrap();
}

/// The mean of many.
fn measure(gate: &Gate, caller: &Caller, target: &Target) -> Duration {
    let (begun, mut count) = (Instant::now(), 0);
    while begun.elapsed() < MEASURE {
        for _ in 0..1000 {
            black_box(gate.authorize(black_box(caller), Send(black_box(target))).is_ok());
        }
        count += 1000;
    }
    begun.elapsed() / count
}
