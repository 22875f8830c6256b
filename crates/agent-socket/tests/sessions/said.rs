//! What is said when.

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::time::timeout;
use trunkline_agent_socket::{
    Close, Type,
    client::{Client, Options},
    close::code,
    link::Terms,
    store::{EventStore as _, Keep, MemoryStore},
    transport::{Broken, MemoryTransport},
};

use crate::support::{Echo, PATIENCE, Socket, emit, options, server, with_store, with_terms};

#[tokio::test]
async fn a_turn_from_its_start_to_its_end() {
    let server = server();
    let (mut socket, welcome, state) = Socket::hello(&server, "web-a", json!({"lastSeenSeq": 0})).await;
    assert_eq!((&welcome["runtimeGeneration"], &welcome["clientId"]), (&json!("g1"), &json!("web-a")));
    assert_eq!((&welcome["payload"]["version"], &welcome["payload"]["latestSeq"]), (&json!(1), &json!(0)));
    assert!(welcome["socketId"].as_str().unwrap().len() > 8);
    let idle = json!({"runtimeGeneration": "g1", "activeTurn": null, "tool": {"status": "idle"}, "seq": 0});
    assert_eq!(state["payload"], idle);
    socket.say(json!({"type": "turn_start", "turnId": "t-1", "payload": {"text": "hi"}})).await;
    let mut last = 0;
    for kind in ["turn_queued", "turn_text_delta", "turn_text_delta", "turn_text_delta", "turn_done"] {
        let event = socket.expect(kind).await;
        assert_eq!((&event["turnId"], &event["prev"]), (&json!("t-1"), &json!(last)));
        last = event["seq"].as_u64().unwrap();
    }
    socket.say(json!({"type": "state_request"})).await;
    assert_eq!(socket.expect("state_snapshot").await["payload"]["seq"], last);
    // The same turn does not run again.
    socket.say(json!({"type": "turn_start", "turnId": "t-1", "payload": {"text": "hi"}})).await;
    socket.expect("state_snapshot").await;
    server.settled().await;
    socket.say(json!({"type": "replay_request", "payload": {"since": last}})).await;
    assert_eq!(socket.expect("replay_events").await["payload"]["events"], json!([]));
}

#[tokio::test]
async fn what_is_not_allowed_closes_the_socket_and_no_other() {
    let server = server();
    let (mut witness, _, _) = Socket::hello(&server, "other", json!({})).await;
    let hello =
        json!({"protocol": "agent-socket", "version": 1, "type": "hello", "clientId": "c", "ts": 1}).to_string();
    let large = format!("{{\"a\":\"{}\"}}", "x".repeat(1024 * 1024));
    let with = |field: &str, value: Value| {
        let mut envelope: Value = serde_json::from_str(&hello).unwrap();
        envelope[field] = value;
        envelope.to_string()
    };
    for (frame, code, named) in [
        ("not json".to_owned(), code::UNREADABLE, "JSON"),
        (with("type", json!("turn_started")), code::UNREADABLE, "type"),
        (with("seq", json!(-1)), code::UNREADABLE, "seq"),
        (with("ts", json!("now")), code::UNREADABLE, "ts"),
        (with("clientId", json!("x".repeat(300))), code::UNREADABLE, "clientId"),
        (with("clientId", json!("")), code::UNREADABLE, "clientId"),
        (with("payload", json!({"lastSeenSeq": "x"})), code::UNREADABLE, "payload"),
        (with("protocol", json!("other")), code::PROTOCOL, "protocol"),
        (with("version", json!(2)), code::PROTOCOL, "version"),
        (with("type", json!("state_request")), code::POLICY, "hello"),
        (large, code::TOO_LARGE, "bytes"),
    ] {
        let mut socket = Socket::open(&server);
        socket.raw(&frame).await;
        let close = socket.closed().await;
        assert_eq!(close.code, code, "{close}");
        assert!(close.reason.contains(named) && close.reason.len() <= 123, "{close}");
        assert_eq!(socket.served.await.unwrap(), Err(close));
    }
    let (mut socket, _, _) = Socket::hello(&server, "c", Value::Null).await;
    socket.raw(&hello).await;
    assert_eq!(socket.closed().await.code, code::POLICY, "a second hello");
    witness.say(json!({"type": "state_request"})).await;
    witness.expect("state_snapshot").await;
}

#[tokio::test(start_paused = true)]
async fn whoever_says_nothing_is_asked_and_then_let_go() {
    let server = server();
    let mut silent = Socket::open(&server);
    let begun = tokio::time::Instant::now();
    let close = silent.closed().await;
    assert_eq!((close.code, begun.elapsed().as_secs()), (code::POLICY, 10));
    let (mut socket, _, _) = Socket::hello(&server, "c", json!({})).await;
    let begun = tokio::time::Instant::now();
    let beat = socket.expect("heartbeat").await;
    assert_eq!((begun.elapsed().as_secs(), &beat["payload"]["latestSeq"]), (15, &json!(0)));
    // A sign of life.
    socket.say(json!({"type": "heartbeat"})).await;
    for _ in 0..2 {
        socket.expect("heartbeat").await;
    }
    let close = socket.closed().await;
    assert_eq!((close.code, begun.elapsed().as_secs()), (code::AWAY, 60));
}

#[tokio::test]
async fn two_tabs_see_the_same_and_who_comes_back_gets_the_rest() {
    let server = server();
    let (mut one, first, _) = Socket::hello(&server, "c", json!({})).await;
    let (mut two, second, _) = Socket::hello(&server, "c", json!({})).await;
    let (mut other, _, _) = Socket::hello(&server, "d", json!({})).await;
    assert_ne!(first["socketId"], second["socketId"]);
    for number in 0..3 {
        emit(&server, "c", Type::TurnTextDelta, json!({"delta": number.to_string()}), "t").await;
    }
    emit(&server, "d", Type::TurnDone, json!({}), "t").await;
    for socket in [&mut one, &mut two] {
        for number in 0..3 {
            assert_eq!(socket.expect("turn_text_delta").await["payload"]["delta"], number.to_string());
        }
    }
    other.expect("turn_done").await;
    drop(one);
    emit(&server, "c", Type::TurnDone, json!({}), "t").await;
    let (mut one, again, _) = Socket::hello(&server, "c", json!({"lastSeenSeq": 2})).await;
    assert_eq!(again["payload"]["latestSeq"], 4);
    one.say(json!({"type": "replay_request", "payload": {"since": 2}})).await;
    let replayed = one.expect("replay_events").await;
    let types: Vec<_> = replayed["payload"]["events"].as_array().unwrap().iter().map(|event| &event["type"]).collect();
    assert_eq!(types, ["turn_text_delta", "turn_done"]);
    assert_eq!((&replayed["payload"]["until"], &replayed["payload"]["more"]), (&json!(4), &json!(false)));
    // A part of it.
    one.say(json!({"type": "replay_request", "payload": {"since": 0, "until": 3, "max": 2}})).await;
    let part = one.expect("replay_events").await["payload"].clone();
    assert_eq!((&part["until"], &part["rest"], part["events"].as_array().unwrap().len()), (&json!(2), &json!(true), 2));
}

#[tokio::test]
async fn no_frame_of_a_replay_is_too_large() {
    let server = with_terms(Terms { frame_bytes_max: 4096, ..Terms::default() });
    let (mut socket, _, _) = Socket::hello(&server, "c", json!({})).await;
    for _ in 0..40 {
        emit(&server, "c", Type::TurnPhase, json!({"phase": "x".repeat(500)}), "t").await;
    }
    drop(socket);
    (socket, _, _) = Socket::hello(&server, "c", json!({})).await;
    socket.say(json!({"type": "replay_request", "payload": {"since": 0}})).await;
    let (mut seen, mut frames) = (0, 0);
    loop {
        let part = socket.expect("replay_events").await;
        assert!(part.to_string().len() <= 4096);
        assert_eq!(part["payload"]["since"], seen);
        for event in part["payload"]["events"].as_array().unwrap() {
            seen += 1;
            assert_eq!(event["seq"], seen);
        }
        frames += 1;
        if part["payload"]["more"] == false {
            break;
        }
    }
    assert!(seen == 40 && frames > 5);
}

#[tokio::test]
async fn what_is_gone_is_told_with_a_fresh_state() {
    let store = MemoryStore::new(Keep { events: 3, events_behind: 3 });
    let server = with_store(store, "g1");
    for number in 0..10 {
        emit(&server, "c", Type::TurnPhase, json!({"phase": number.to_string()}), "t").await;
    }
    let (mut socket, _, _) = Socket::hello(&server, "c", json!({"lastSeenSeq": 2})).await;
    socket.say(json!({"type": "replay_request", "payload": {"since": 2}})).await;
    let replayed = socket.expect("replay_events").await;
    assert_eq!(replayed["payload"]["gone"], json!([2, 7]));
    assert_eq!(replayed["payload"]["events"].as_array().unwrap().len(), 3);
    let state = socket.expect("state_snapshot").await;
    assert_eq!(state["payload"]["activeTurn"]["phase"], "9");
}

#[tokio::test]
async fn a_runtime_that_was_started_again_says_what_was_lost_and_what_was_not() {
    let dir = tempfile::tempdir().unwrap();
    let open =
        || trunkline_agent_socket::store::SqliteStore::open(&dir.path().join("events.db"), Keep::default()).unwrap();
    let server = with_store(open(), "g1");
    for client in ["lost", "kept"] {
        emit(&server, client, Type::TurnStart, json!({}), client).await;
        let meta = trunkline_agent_socket::Meta::operation("o");
        server.emitter().emit(client, Type::ToolStart, &json!({"name": "shell"}), meta).await.unwrap();
    }
    drop(server);
    let recovered_turns = ["kept".to_owned()].into();
    let again = trunkline_agent_socket::server::Options { recovered_turns, ..options("g2") };
    let server = trunkline_agent_socket::server::Server::new(open(), Echo::default(), again);
    let (mut socket, welcome, state) =
        Socket::hello(&server, "lost", json!({"lastSeenSeq": 2, "runtimeGeneration": "g1", "versions": [1]})).await;
    assert_eq!(welcome["runtimeGeneration"], "g2");
    assert_eq!((&state["payload"]["activeTurn"], &state["payload"]["tool"]["status"]), (&Value::Null, &json!("lost")));
    assert_eq!(state["payload"]["lastLostTool"]["name"], "shell");
    socket.say(json!({"type": "replay_request", "payload": {"since": 2}})).await;
    let replayed = socket.expect("replay_events").await;
    let types: Vec<_> = replayed["payload"]["events"].as_array().unwrap().iter().map(|event| &event["type"]).collect();
    assert_eq!(types, ["runtime_generation_changed", "tool_lost", "turn_lost"]);

    // Somebody who does not ask by itself is told at once.
    let mut socket = Socket::open(&server);
    socket.say(json!({"type": "hello", "clientId": "kept", "runtimeGeneration": "g1"})).await;
    socket.expect("welcome").await;
    let changed = socket.expect("runtime_generation_changed").await;
    assert_eq!((&changed["payload"]["to"], &changed["seq"]), (&json!("g2"), &Value::Null));
    let state = socket.expect("state_snapshot").await;
    assert_eq!(state["payload"]["activeTurn"]["id"], "kept");
    assert_eq!(server.state("kept").await.unwrap().runtime_generation, "g2");
}

#[tokio::test]
async fn whoever_does_not_keep_up_gets_pieces_joined_and_nothing_else_changes() {
    let server = server();
    let (mut socket, _, _) = Socket::hello(&server, "c", json!({})).await;
    let mut expected = String::new();
    for number in 0..2000 {
        let text = format!("{number} ");
        emit(&server, "c", Type::TurnTextDelta, json!({"delta": text}), "t").await;
        expected.push_str(&text);
        if number == 1000 {
            emit(&server, "c", Type::TurnPhase, json!({"phase": "half"}), "t").await;
            expected.push('|');
        }
    }
    let (mut text, mut last, mut frames) = (String::new(), 0, 0);
    while last < 2001 {
        let event = socket.envelope().await;
        match event["type"].as_str().unwrap() {
            "turn_phase" => text.push('|'),
            _ => text.push_str(event["payload"]["delta"].as_str().unwrap()),
        }
        assert_eq!(event["prev"], last, "what is between is joined, and nothing is missing");
        last = event["seq"].as_u64().unwrap();
        frames += 1;
    }
    assert_eq!(text, expected);
    assert!(frames < 1500, "{frames}");
}

#[tokio::test]
async fn acknowledgements_are_kept_by_socket_and_the_slowest_decides() {
    let store = Arc::new(MemoryStore::new(Keep { events: 10, events_behind: 100 }));
    let server = with_store(store.clone(), "g1");
    let (mut fast, _, _) = Socket::hello(&server, "c", json!({})).await;
    let (mut slow, _, _) = Socket::hello(&server, "c", json!({})).await;
    slow.say(json!({"type": "ack", "ack": 5})).await;
    for number in 1..=60 {
        emit(&server, "c", Type::TurnPhase, json!({}), "t").await;
        fast.expect("turn_phase").await;
        fast.say(json!({"type": "ack", "ack": number})).await;
    }
    // Answered behind them.
    fast.say(json!({"type": "state_request"})).await;
    fast.expect("state_snapshot").await;
    let first = store.get_since("c", 0).await.unwrap()[0].seq;
    assert_eq!(first, Some(6), "what the slow one has not had is kept");
}

/// A client over a pair for each connection.
fn client(
    server: &trunkline_agent_socket::server::Server<Echo>,
    options: Options,
) -> (Client, tokio::task::JoinHandle<Result<(), Close>>) {
    let server = server.clone();
    let connect = move || {
        let server = server.clone();
        async move {
            let (here, there) = MemoryTransport::pair();
            tokio::spawn(async move { server.serve(there).await });
            Ok::<_, Broken>(here)
        }
    };
    let (client, run) = Client::new(options, connect);
    (client, tokio::spawn(run))
}

#[tokio::test]
async fn a_client_sees_every_event_once_and_knows_the_state() {
    let server = server();
    for number in 0..5 {
        emit(&server, "c", Type::TurnPhase, json!({"phase": number.to_string()}), "old").await;
    }
    emit(&server, "c", Type::TurnDone, json!({}), "old").await;
    let (client, run) = client(&server, Options { last_seen_seq: 2, ..Options::new("c") });
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sees = seen.clone();
    client.on_any(move |envelope| {
        if let Some(seq) = envelope.seq {
            sees.lock().unwrap().push((seq, envelope.kind));
        }
    });
    client.start_turn(&json!({"text": "hi"}), "t-1").await.unwrap();
    let mut view = client.view();
    timeout(PATIENCE, view.wait_for(|view| view.seq == 11)).await.unwrap().unwrap();
    let numbers: Vec<_> = seen.lock().unwrap().iter().map(|(seq, _)| *seq).collect();
    assert_eq!(numbers, (3..=11).collect::<Vec<_>>());
    client.request_replay(Some(0)).await.unwrap();
    client.abort_turn("t-1").await.unwrap();
    client.resolve_approval("o", &json!({"approved": true})).await.unwrap();
    client.send(Type::AttachmentReady, &json!({"id": 1}), Default::default()).await.unwrap();
    client.ack(None).await.unwrap();
    client.request_state().await.unwrap();
    emit(&server, "c", Type::TurnPhase, json!({"phase": "last"}), "t-2").await;
    timeout(PATIENCE, view.wait_for(|view| view.seq == 12)).await.unwrap().unwrap();
    assert_eq!(seen.lock().unwrap().len(), 10, "what is asked for again is not seen again");
    let state = client.view().borrow().state.clone().unwrap();
    assert_eq!(state.active_turn.unwrap().phase.as_deref(), Some("last"));
    assert_eq!((client.seq(), client.generation().as_deref()), (12, Some("g1")));
    drop((client, view));
    assert_eq!(timeout(PATIENCE, run).await.unwrap().unwrap(), Ok(()));
}

#[tokio::test]
async fn over_a_real_socket() {
    use trunkline_agent_socket::transport::websocket;

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = server();
    let serves = server.clone();
    let cut = tokio_util::sync::CancellationToken::new();
    let cuts = Arc::new(Mutex::new(cut.clone()));
    let cutting = cuts.clone();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (server, cut) = (serves.clone(), cutting.lock().unwrap().clone());
            tokio::spawn(async move {
                let socket = websocket::accept(stream, 1024 * 1024).await.unwrap();
                let _ = cut.run_until_cancelled(server.serve(socket)).await;
            });
        }
    });
    let connect = move || websocket::connect(format!("ws://{address}/agent-socket"), 1024 * 1024);
    let options = Options { pause: std::time::Duration::from_millis(1), ..Options::new("c") };
    let (client, run) = Client::new(options, connect);
    let run = tokio::spawn(run);
    let text = Arc::new(Mutex::new(String::new()));
    let adds = text.clone();
    client.on(Type::TurnTextDelta, move |envelope| {
        adds.lock().unwrap().push_str(envelope.value()["delta"].as_str().unwrap());
    });
    client.start_turn(&json!({"text": "hi. "}), "t-1").await.unwrap();
    let mut view = client.view();
    timeout(PATIENCE, view.wait_for(|view| view.seq == 5)).await.unwrap().unwrap();
    // Cut in the middle of everything; what is said meanwhile is said when it is back.
    let former = std::mem::take(&mut *cuts.lock().unwrap());
    former.cancel();
    client.start_turn(&json!({"text": "bye."}), "t-2").await.unwrap();
    timeout(PATIENCE, view.wait_for(|view| view.seq == 10)).await.unwrap().unwrap();
    assert_eq!(*text.lock().unwrap(), "you said hi. you said bye.");
    // Frames that are too large end it with their code.
    let raw = websocket::connect(format!("ws://{address}/"), 4 * 1024 * 1024).await.unwrap();
    let close = {
        use trunkline_agent_socket::transport::{Frame, Receiver as _, Sender as _, Transport as _};
        let (mut sender, mut receiver) = raw.split();
        sender.feed("x".repeat(2 * 1024 * 1024)).await.unwrap();
        let _ = sender.flush().await;
        match timeout(PATIENCE, receiver.next()).await.unwrap() {
            Some(Ok(Frame::Closed(Some(close)))) => close,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(close.code, code::TOO_LARGE);
    drop((client, view));
    assert_eq!(timeout(PATIENCE, run).await.unwrap().unwrap(), Ok(()));
}
