//! What clients of the socket surface ask, and who gets it: the same on every ledger.

#![allow(clippy::disallowed_methods, clippy::panic, clippy::unwrap_used, reason = "test code")]

use std::{collections::HashSet, sync::Arc, time::Duration};

use tokio::{task::JoinHandle, time::timeout};
use tokio_util::task::TaskTracker;
use trunkline_core::{
    Kind,
    caller::{Caller, Credential},
    gate::Gate,
    identity::Identity,
    socket::{Aim, Ask, Asked, Duty, Need, Sockets},
};
use trunkline_store::{
    Store,
    ledger::{self, Ledger, Relay},
    log::{Clock, Item},
};

const PATIENCE: Duration = Duration::from_secs(20);

struct World {
    sockets: Sockets,
    relay: JoinHandle<()>,
    _dir: tempfile::TempDir,
}

impl World {
    async fn new(database: Option<String>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let migrations = trunkline_core::migrations();
        let options =
            trunkline_store::Options { migrations: migrations.clone(), ..trunkline_store::Options::default() };
        let mut store = Store::open(dir.path(), options).unwrap();
        if let Some(url) = database {
            store.ledger = Ledger::open_postgres(&url, &migrations, ledger::Options::default()).await.unwrap();
        }
        let relay = tokio::spawn(Relay::new(store.ledger.clone(), store.log.clone()).run());
        let gate = Gate::open(store).await.unwrap();
        let sockets = Sockets::open(gate, Clock::system(), TaskTracker::new()).await.unwrap();
        Self { sockets, relay, _dir: dir }
    }

    async fn ask(&self, client: &str, turn: &str, aim: Aim, told: &'static str) -> Result<Asked, Kind> {
        let permit = self.sockets.enter(&admin(), client, Need::Show).unwrap();
        let ask = Ask {
            number: 0,
            client: String::new(),
            socket: "tab".into(),
            kind: format!("{aim:?}"),
            turn: turn.into(),
            request: String::new(),
            body: format!("{client} {turn}"),
        };
        let told = (!told.is_empty()).then(|| told.into());
        self.sockets.ask(&permit, ask, aim, told).await.map_err(|error| error.kind)
    }

    /// What the client's stream has.
    async fn stream(&self, client: &str, count: usize) -> Vec<String> {
        let permit = self.sockets.enter(&admin(), client, Need::Show).unwrap();
        let (mut reader, mut told) = (self.sockets.follow(&permit, 0).unwrap(), Vec::new());
        while told.len() < count {
            if let Item::Record(record) = timeout(PATIENCE, reader.next()).await.unwrap().unwrap() {
                told.push(String::from_utf8(record.payload.to_vec()).unwrap());
            }
        }
        told
    }
}

fn caller(serves: &[&str]) -> Caller {
    let serves: Arc<[_]> = serves.iter().map(|pattern| glob::Pattern::new(pattern).unwrap()).collect();
    let credential = Credential { serves, ..Credential::none(false) };
    Caller::new(Identity::user("ann", "http").unwrap(), "session".into(), credential)
}

fn admin() -> Caller {
    Caller::new(Identity::user("root", "http").unwrap(), "session".into(), Credential::none(true))
}

async fn next(duty: &Duty) -> Vec<Ask> {
    timeout(PATIENCE, duty.next()).await.unwrap().unwrap()
}

fn bodies(asks: &[Ask]) -> Vec<&str> {
    asks.iter().map(|ask| ask.body.as_str()).collect()
}

async fn suite(world: World) {
    // A turn is asked for once, for each client.
    assert_eq!(world.ask("a", "t", Aim::Begin, "a waits").await, Ok(Asked::Waits));
    assert_eq!(world.ask("a", "t", Aim::Begin, "a waits again").await, Ok(Asked::Known));
    assert_eq!(world.ask("b", "t", Aim::Begin, "").await, Ok(Asked::Waits));
    assert_eq!(world.ask("a", "", Aim::Begin, "").await, Ok(Asked::Waits), "without an id, all are different");
    assert_eq!(world.ask("a", "", Aim::Begin, "").await, Ok(Asked::Waits));
    // One that nobody took is taken back; its id is used up.
    assert_eq!(world.ask("c", "u", Aim::Begin, "c waits").await, Ok(Asked::Waits));
    assert_eq!(world.ask("c", "u", Aim::Stop, "c stops").await, Ok(Asked::Stopped));
    assert_eq!(world.ask("c", "u", Aim::Begin, "").await, Ok(Asked::Known));
    assert_eq!(world.stream("a", 1).await, ["a waits"]);
    assert_eq!(world.stream("c", 2).await, ["c waits", "c stops"]);

    // Each runtime gets what is its, in order; the one that came last comes first.
    assert!(world.sockets.attach(&caller(&[]), "g0", HashSet::new()).is_err_and(|error| error.kind == Kind::Denied));
    let all = world.sockets.attach(&caller(&["*"]), "g1", ["r".to_owned()].into()).unwrap();
    let only_b = world.sockets.attach(&caller(&["b"]), "g2", HashSet::new()).unwrap();
    assert_eq!(world.sockets.generation("b"), Some(("g2".to_owned(), HashSet::new())));
    assert_eq!(world.sockets.generation("a"), Some(("g1".to_owned(), ["r".to_owned()].into())));
    assert!(only_b.serves("b") && !all.serves("b") && all.serves("a"));
    let a = world.sockets.enter(&admin(), "a", Need::Show).unwrap();
    assert!(world.sockets.waiting_turns(&a).await.unwrap().contains("t"));
    let asks = next(&all).await;
    assert_eq!(bodies(&asks), ["a t", "a ", "a "]);
    let for_b = next(&only_b).await;
    assert_eq!(bodies(&for_b), ["b t"]);
    // It says something of the turn, and that it has one of the others.
    all.heard_of("a", "t");
    all.has(asks[1].number);
    while world.sockets.waiting_turns(&a).await.unwrap().contains("t") {
        tokio::task::yield_now().await;
    }
    // One that is running is asked to stop.
    assert_eq!(world.ask("a", "t", Aim::Stop, "").await, Ok(Asked::Waits));
    assert_eq!(next(&all).await[0].kind, "Stop");
    // What a runtime said nothing of, another one gets.
    drop(only_b);
    assert_eq!(bodies(&next(&all).await), ["b t"]);
    drop(all);
    assert_eq!(world.sockets.generation("b"), None);
    let again = world.sockets.attach(&caller(&["*"]), "g3", HashSet::new()).unwrap();
    let mut asked = Vec::new();
    while asked.len() < 3 {
        asked.extend(bodies(&next(&again).await).into_iter().map(ToOwned::to_owned));
    }
    assert_eq!(asked, ["b t", "a ", "a t"]);
    drop(again);
    requests(&world).await;
    acknowledgements(&world).await;
    hand_overs(&world).await;
    bounds(&world).await;
    numbers(&world).await;
    world.relay.abort();
}

/// A request is taken once, whatever it is, by whichever socket of its client it is said.
async fn requests(world: &World) {
    let ask = async |client: &str, turn: &str, aim: Aim, request: &str| {
        let permit = world.sockets.enter(&admin(), client, Need::Show).unwrap();
        let ask = Ask {
            number: 0,
            client: String::new(),
            socket: "tab".into(),
            kind: format!("{aim:?}"),
            turn: turn.into(),
            request: request.into(),
            body: request.into(),
        };
        let told = (aim == Aim::Stop).then(|| "stopped".into());
        world.sockets.ask(&permit, ask, aim, told).await.unwrap()
    };
    let mut outcomes = Vec::new();
    for _ in 0..2 {
        outcomes.push(ask("q", "", Aim::Other, "one").await);
        outcomes.push(ask("q", "", Aim::Other, "two").await);
        outcomes.push(ask("r", "", Aim::Other, "one").await);
        outcomes.push(ask("q", "t", Aim::Begin, "begin").await);
    }
    assert_eq!(outcomes, [[Asked::Waits; 4], [Asked::Known; 4]].concat());
    // Of a turn that no runtime had, none hears that it is stopped, however often that is said.
    assert_eq!(ask("q", "t", Aim::Stop, "stop").await, Asked::Stopped);
    assert_eq!(ask("q", "t", Aim::Stop, "stop").await, Asked::Known);
    assert_eq!(ask("q", "t", Aim::Begin, "begin").await, Asked::Known);
    let runtime = world.sockets.attach(&caller(&["q", "r"]), "g", HashSet::new()).unwrap();
    let mut asked = Vec::new();
    while asked.len() < 3 {
        asked.extend(bodies(&next(&runtime).await).into_iter().map(ToOwned::to_owned));
    }
    assert_eq!(asked, ["one", "two", "one"]);
    assert_eq!(ask("q", "", Aim::Other, "one").await, Asked::Known, "a runtime has it");
}

/// What each socket had is kept, of the last hundred of a client.
async fn acknowledgements(world: &World) {
    let permit = |client| world.sockets.enter(&admin(), client, Need::Show).unwrap();
    let (own, other) = (permit("acks"), permit("others"));
    for (socket, seq) in [("tab", 7), ("tab", 5), ("second", 3)] {
        world.sockets.put_had(&own, socket, seq).await.unwrap();
    }
    let had = async |permit, socket| world.sockets.had(permit, socket).await.unwrap();
    assert_eq!((had(&own, "tab").await, had(&own, "second").await), (Some(7), Some(3)));
    assert_eq!((had(&own, "third").await, had(&other, "tab").await), (None, None));
    for number in 0..200 {
        world.sockets.put_had(&other, &format!("tab-{number}"), 1).await.unwrap();
    }
    let mut kept = 0;
    for number in 0..200 {
        let socket = format!("tab-{number}");
        kept += usize::from(world.sockets.had(&other, &socket).await.unwrap().is_some());
    }
    assert_eq!(kept, 100);
    assert_eq!(had(&own, "tab").await, Some(7), "another client's");
}

/// One runtime goes in the moment in which the next one reads what waits: every request is delivered all the same.
async fn hand_overs(world: &World) {
    const ROUNDS: usize = 60;
    const HAD: usize = 4;
    let large = "x".repeat(200_000);
    let ask = async |turn: String| {
        let permit = world.sockets.enter(&admin(), "handed", Need::Show).unwrap();
        let (number, client, socket, kind) = (0, String::new(), "tab".into(), "turn_start".into());
        let request = String::new();
        let ask = Ask { number, client, socket, kind, turn, request, body: large.clone() };
        assert_eq!(world.sockets.ask(&permit, ask, Aim::Begin, None).await.unwrap(), Asked::Waits);
    };
    let runtime = || world.sockets.attach(&caller(&["handed"]), "g", HashSet::new()).unwrap();
    let mut current = runtime();
    for round in 0..ROUNDS {
        let mut had = Vec::new();
        for n in 0..HAD {
            ask(format!("{round} had {n}")).await;
        }
        while had.len() < HAD {
            had.extend(next(&current).await.into_iter().map(|ask| ask.turn));
        }
        let newcomer = runtime();
        // What is asked while two are there is for the newcomer, which reads it while the other one goes.
        for n in 0..HAD {
            ask(format!("{round} new {n}")).await;
        }
        let leaves = tokio::spawn(async move { drop(current) });
        let mut delivered = HashSet::new();
        while delivered.len() < 2 * HAD {
            for ask in next(&newcomer).await {
                newcomer.has(ask.number);
                delivered.insert(ask.turn);
            }
        }
        assert!(had.iter().all(|turn| delivered.contains(turn)), "round {round}: {delivered:?}");
        leaves.await.unwrap();
        current = newcomer;
    }
}

async fn bounds(world: &World) {
    // What waits has a bound, and each client its own.
    let mut last = Ok(Asked::Waits);
    for turn in 0..1001 {
        last = world.ask("full", &turn.to_string(), Aim::Begin, "").await;
    }
    assert_eq!(last, Err(Kind::Exhausted));
    assert_eq!(world.ask("other", "t", Aim::Begin, "").await, Ok(Asked::Waits));
    world.sockets.sweep(Some(Duration::from_hours(1))).await.unwrap();
    assert_eq!(world.ask("a", "t", Aim::Begin, "").await, Ok(Asked::Known), "for a day");
    // Also in bytes, however few.
    let permit = world.sockets.enter(&admin(), "large", Need::Show).unwrap();
    let body = "x".repeat(1024 * 1024);
    let ask = async |turn: usize| {
        let (number, client, socket, kind) = (0, String::new(), "tab".into(), "turn_start".into());
        let (turn, request) = (turn.to_string(), String::new());
        let ask = Ask { number, client, socket, kind, turn, request, body: body.clone() };
        world.sockets.ask(&permit, ask, Aim::Begin, None).await.map_err(|error| error.kind)
    };
    for turn in 0..16 {
        assert_eq!(ask(turn).await, Ok(Asked::Waits));
    }
    assert_eq!(ask(16).await, Err(Kind::Exhausted));
    // A runtime is handed no more than fits at once, and all of it in the end.
    let runtime = world.sockets.attach(&caller(&["large"]), "g", HashSet::new()).unwrap();
    let mut handed = 0;
    while handed < 16 {
        let asks = next(&runtime).await;
        assert!(asks.len() <= 5, "{} MiB at once", asks.len());
        asks.iter().for_each(|ask| runtime.has(ask.number));
        handed += asks.len();
    }
    drop(runtime);
    while !world.sockets.waiting_turns(&permit).await.unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    // What no runtime took for as long as that is forgotten, and may be asked again.
    let other = world.sockets.enter(&admin(), "full", Need::Show).unwrap();
    assert_eq!(world.sockets.waiting_turns(&other).await.unwrap().len(), 1000);
    world.sockets.sweep(Some(Duration::ZERO)).await.unwrap();
    assert_eq!(world.sockets.waiting_turns(&other).await.unwrap().len(), 0);
    assert_eq!(world.ask("full", "0", Aim::Begin, "").await, Ok(Asked::Waits));
}

async fn numbers(world: &World) {
    // How far a runtime is, and checkpoints.
    let teller = world.sockets.teller("g1").await.unwrap();
    assert_eq!(teller.told_to(), 0);
    let permit = world.sockets.enter(&caller(&["d"]), "d", Need::Serve).unwrap();
    let told = |text: &'static str| vec![(permit.clone(), text.into())];
    world.sockets.tell_numbered(told("one"), &teller, 7).await.unwrap();
    world.sockets.tell_numbered(told("two"), &teller, 9).await.unwrap();
    // A later connection goes on there, and the former one is over.
    assert_eq!(world.sockets.teller("g1").await.unwrap().told_to(), 9);
    let late = world.sockets.tell_numbered(told("late"), &teller, 10).await;
    assert!(late.is_err_and(|error| error.kind == Kind::Exists));
    assert_eq!(world.stream("d", 2).await, ["one", "two"]);
    let shows = world.sockets.enter(&admin(), "d", Need::Show).unwrap();
    let refused = world.sockets.tell(vec![(shows.clone(), "no".into())]).await;
    assert!(refused.is_err_and(|error| error.kind == Kind::Denied), "who shows a stream tells nothing in it");
    assert!(world.sockets.enter(&caller(&["d"]), "e", Need::Serve).is_err());
    assert_eq!(world.sockets.checkpoint(&shows).await.unwrap(), None);
    for (folded_to, state) in [(5, "five"), (9, "nine"), (7, "seven")] {
        world.sockets.put_checkpoint(&shows, folded_to, state.into()).await.unwrap();
    }
    assert_eq!(world.sockets.checkpoint(&shows).await.unwrap(), Some((9, "nine".to_owned())));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_sqlite() {
    suite(World::new(None).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres() {
    let database = trunkline_store::conformance::postgres::database().await;
    suite(World::new(Some(database)).await).await;
}
