//! How a client comes, stays, comes back and goes.

use std::{error::Error as _, time::Duration};

use bytes::Bytes;
use tonic::{Code, Status};
use trunkline_client::{
    Agent, DuplicateRetry, Kind, Orchestrator, Outgoing, Reconnect, State, Topic, UniqueTask, User,
    kv::Scope,
    proto::{
        ConnectionAck, DownstreamMessage, ErrorResponse, IncomingMessage, KvResponse, MessageType, TaskEvent,
        TaskQueryResponse, TaskStatusChangedEvent, TaskSubscriptionOperationResponse, WorkspaceInfo, WorkspaceResponse,
        downstream_message::Payload as Down, signal::SignalType, task_event, upstream_message::Payload as Up,
    },
};

use crate::{
    peer::{ACK, Line, Peer, agent, quick, stock, trunkline},
    server::soon,
};

fn to() -> Topic {
    Topic::agent("ws", "impl", "b").unwrap()
}

fn message(text: &str) -> Down {
    Down::Msg(IncomingMessage {
        source_topic: "ag::ws::impl::b".into(),
        payload: Bytes::copy_from_slice(text.as_bytes()),
        message_type: MessageType::Chat.into(),
        ..IncomingMessage::default()
    })
}

#[tokio::test]
async fn each_refusal_has_its_kind_and_ends_it() {
    let cases = [
        (Code::AlreadyExists, Kind::Duplicate),
        (Code::PermissionDenied, Kind::Denied),
        (Code::Unauthenticated, Kind::Unauthenticated),
        (Code::InvalidArgument, Kind::Invalid),
        (Code::NotFound, Kind::NotFound),
        (Code::Unimplemented, Kind::Unimplemented),
        (Code::FailedPrecondition, Kind::Precondition),
    ];
    for (code, kind) in cases {
        let mut peer = Peer::begin().await;
        let connects = tokio::spawn(agent().address(peer.address.to_string()).connect());
        peer.line().await.fail(Status::new(code, "no")).await;
        let refused = soon(connects).await.unwrap().unwrap_err();
        assert_eq!((refused.kind(), refused.to_string().as_str()), (kind, "no"), "{code:?}");
        assert!(!refused.is_retryable() && refused.source().is_some(), "{code:?}");
    }
}

#[tokio::test]
async fn what_cannot_be_is_refused_before_anything_is_sent() {
    let wrong = [
        Agent::builder("", "impl", "a").connect().await.map(drop),
        Agent::builder("ws", "im::pl", "a").connect().await.map(drop),
        UniqueTask::builder("ws", "impl", "").connect().await.map(drop),
        Orchestrator::builder("impl").connect().await.map(drop),
        agent().address("ftp://localhost").connect().await.map(drop),
        agent().metadata("no header", "x").connect().await.map(drop),
        User::builder("u", "w").workspace("a b").connect().await.map(drop),
    ];
    for refused in wrong {
        assert_eq!(refused.unwrap_err().kind(), Kind::Invalid);
    }
}

#[tokio::test]
async fn nobody_there_is_told_after_all_attempts() {
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let builder = agent().address(gone.to_string()).reconnect(Reconnect { attempts: Some(3), ..quick() });
    let refused = soon(builder.connect()).await.unwrap_err();
    assert_eq!((refused.kind(), refused.is_retryable()), (Kind::Unavailable, true));
    assert!(refused.to_string().starts_with("gave up after 3 attempts: cannot connect to"), "{refused}");
}

#[tokio::test]
async fn a_server_that_says_nothing_is_not_waited_for_forever() {
    let mut peer = Peer::begin().await;
    let builder = agent().connect_timeout(Duration::from_millis(50)).reconnect(Reconnect::never());
    let connects = tokio::spawn(builder.address(peer.address.to_string()).connect());
    let _silent = peer.line().await;
    assert_eq!(soon(connects).await.unwrap().unwrap_err().kind(), Kind::Unavailable);
}

#[tokio::test]
async fn what_comes_before_the_acknowledgement_is_kept() {
    let mut peer = Peer::begin().await;
    let connects = tokio::spawn(agent().address(peer.address.to_string()).connect());
    let line = peer.line().await;
    line.put(message("early")).await;
    line.frame(DownstreamMessage::default()).await;
    line.ack(stock()).await;
    line.put(message("late")).await;
    let agent = soon(connects).await.unwrap().unwrap();
    let mut messages = agent.messages();
    assert_eq!(soon(messages.next()).await.unwrap().text(), "early");
    assert_eq!(soon(messages.next()).await.unwrap().text(), "late");
}

#[tokio::test]
async fn the_acknowledgement_is_readable_and_names_a_worker() {
    let mut peer = Peer::begin().await;
    let ack = ConnectionAck {
        resumed: true,
        assigned_id: "w-7".into(),
        reconnection_count: 3,
        initial_connection_unix_ms: 5,
        server_version: "9".into(),
        ..trunkline()
    };
    let worker = trunkline_client::Worker::builder("ws", "impl");
    let (worker, line) = peer.accept_as(worker, ack).await;
    let welcome = worker.welcome().unwrap();
    assert_eq!((welcome.session_id.as_str(), welcome.resumed, welcome.reconnections), ("session-1", true, 3));
    assert_eq!((welcome.server_version.as_str(), welcome.first_connected_ms), ("9", 5));
    assert_eq!(worker.identity().as_str(), "ta::ws::impl::w-7");
    assert_eq!(line.init.client_sdk, "rust");
    assert!(!line.init.client_version.is_empty() && line.init.client_build_info.is_some());
}

#[tokio::test]
async fn an_extension_that_is_required_and_missing_ends_it() {
    let mut peer = Peer::begin().await;
    let builder = agent().extension("https://example.org/x", "1", true).at_least_once();
    let connects = tokio::spawn(builder.address(peer.address.to_string()).connect());
    let line = peer.line().await;
    let declared: Vec<_> = line.init.extensions.iter().map(|each| (each.uri.as_str(), each.required)).collect();
    assert_eq!(declared, [("https://example.org/x", true), (ACK, false)]);
    line.ack(stock()).await;
    assert_eq!(soon(connects).await.unwrap().unwrap_err().kind(), Kind::Precondition);
}

/// The next connection, which resumes the session.
async fn back(peer: &mut Peer) -> Line {
    let line = peer.line().await;
    assert_eq!(line.init.resume_session_id, "session-1");
    line.ack(ConnectionAck { resumed: true, ..trunkline() }).await;
    line
}

#[tokio::test]
async fn it_comes_back_after_every_end_but_a_forced_one() {
    let mut peer = Peer::begin().await;
    let (agent, line) = peer.agent().await;
    let (mut signals, mut state) = (agent.signals(), agent.state());
    line.fail(Status::unavailable("restart")).await;
    let line = back(&mut peer).await;
    drop(line.split());
    let line = back(&mut peer).await;
    line.signal(7, "something new").await;
    line.signal(SignalType::GracefulDisconnect.into(), "moving").await;
    let line = back(&mut peer).await;
    soon(state.wait_for(|state| matches!(state, State::Connected(_)))).await.unwrap();
    line.signal(SignalType::ForceDisconnect.into(), "you are banned").await;
    let because = soon(agent.ended()).await;
    assert_eq!(because.kind(), Kind::Disconnected);
    assert!(because.to_string().contains("you are banned"));
    assert!(
        matches!(soon(signals.next()).await, Some(trunkline_client::Signal::GracefulDisconnect(why)) if why == "moving")
    );
    let refused = agent.send(Outgoing::new(to(), "x")).await.unwrap_err();
    assert_eq!(refused.kind(), Kind::Disconnected);
}

#[tokio::test]
async fn a_taken_identity_is_waited_for_only_if_asked() {
    let mut peer = Peer::begin().await;
    let retry = DuplicateRetry { attempts: 2, delay: Duration::from_millis(5) };
    let connects = tokio::spawn(agent().retry_on_duplicate(retry).address(peer.address.to_string()).connect());
    peer.line().await.fail(Status::already_exists("taken")).await;
    peer.line().await.fail(Status::already_exists("taken")).await;
    peer.line().await.ack(trunkline()).await;
    soon(connects).await.unwrap().unwrap();
}

#[tokio::test]
async fn what_is_sent_during_a_break_goes_out_after_it_in_order() {
    let mut peer = Peer::begin().await;
    let (agent, mut line) = peer.agent().await;
    let mut state = agent.state();
    agent.send(Outgoing::new(to(), "0")).await.unwrap();
    assert_eq!(line.text().await, "0");
    line.fail(Status::unavailable("restart")).await;
    soon(state.wait_for(|state| !matches!(state, State::Connected(_)))).await.unwrap();
    for n in 1..=5 {
        agent.send(Outgoing::new(to(), n.to_string())).await.unwrap();
    }
    let mut line = back(&mut peer).await;
    for n in 1..=5 {
        assert_eq!(line.text().await, n.to_string());
    }
}

#[tokio::test]
async fn a_full_queue_is_waited_for_and_then_told() {
    let mut peer = Peer::begin().await;
    let builder = agent().outbox(2).send_timeout(Duration::from_millis(30));
    let (agent, line) = peer.accept(builder.reconnect(Reconnect { first: Duration::from_secs(60), ..quick() })).await;
    line.fail(Status::unavailable("restart")).await;
    let mut state = agent.state();
    soon(state.wait_for(|state| !matches!(state, State::Connected(_)))).await.unwrap();
    // No connection is accepted from here on.
    let _waiting = tokio::spawn(async move { peer.line().await });
    agent.send(Outgoing::new(to(), "1")).await.unwrap();
    agent.send(Outgoing::new(to(), "2")).await.unwrap();
    let refused = soon(agent.send(Outgoing::new(to(), "3"))).await.unwrap_err();
    assert_eq!((refused.kind(), refused.is_retryable()), (Kind::Unavailable, true));
    assert_eq!(agent.try_send(Outgoing::new(to(), "3")).unwrap_err().kind(), Kind::Exhausted);
    assert_eq!(soon(agent.close()).await, 2, "what never went out is counted");
}

#[tokio::test]
async fn requests_that_only_look_are_made_again_and_others_fail() {
    let mut peer = Peer::begin().await;
    let (agent, mut line) = peer.agent().await;
    let kv = agent.kv(Scope::Global);
    let (reader, writer) = (kv.clone(), kv.clone());
    let read = tokio::spawn(async move { reader.get("k").await });
    assert!(matches!(line.next().await, Up::KvOp(_)));
    let write = tokio::spawn(async move { writer.put("k", "v").await });
    assert!(matches!(line.next().await, Up::KvOp(_)));
    line.fail(Status::unavailable("restart")).await;
    let mut line = back(&mut peer).await;
    let refused = soon(write).await.unwrap().unwrap_err();
    assert_eq!((refused.kind(), refused.is_retryable()), (Kind::Interrupted, true));
    let Up::KvOp(again) = line.next().await else { panic!("expected the request again") };
    let reply = KvResponse { success: true, value: "v".into(), request_id: again.request_id, ..Default::default() };
    line.put(Down::Kv(reply.into())).await;
    assert_eq!(soon(read).await.unwrap().unwrap().as_deref(), Some(&b"v"[..]));
}

#[tokio::test]
async fn a_request_that_nobody_wants_any_more_does_not_go_out() {
    let mut peer = Peer::begin().await;
    let (agent, line) = peer.agent().await;
    let mut state = agent.state();
    line.fail(Status::unavailable("restart")).await;
    soon(state.wait_for(|state| !matches!(state, State::Connected(_)))).await.unwrap();
    let kv = agent.kv(Scope::Global);
    let impatient = tokio::time::timeout(Duration::from_millis(5), kv.put("k", "v")).await;
    assert!(impatient.is_err());
    agent.send(Outgoing::new(to(), "behind it")).await.unwrap();
    assert_eq!(back(&mut peer).await.text().await, "behind it");
}

#[tokio::test]
async fn a_confirmed_message_is_sent_again_with_its_key() {
    let mut peer = Peer::begin().await;
    let (agent, mut line) = peer.agent().await;
    let sender = agent.clone();
    let sent = tokio::spawn(async move { sender.send_confirmed(Outgoing::new(to(), "1")).await });
    let Up::Send(first) = line.next().await else { panic!("expected a message") };
    assert!(matches!(line.next().await, Up::TaskQuery(_)), "a question behind it");
    line.fail(Status::unavailable("restart")).await;
    let mut line = back(&mut peer).await;
    let Up::Send(second) = line.next().await else { panic!("expected a message") };
    assert_eq!(first, second);
    assert!(!first.idempotency_key.is_empty());
    let Up::TaskQuery(asked) = line.next().await else { panic!("expected a question") };
    let reply = TaskQueryResponse { request_id: asked.request_id, ..TaskQueryResponse::default() };
    line.put(Down::TaskQuery(reply.into())).await;
    soon(sent).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_refused_message_is_told_to_its_sender_alone() {
    let mut peer = Peer::begin().await;
    let (agent, mut line) = peer.agent().await;
    let sender = agent.clone();
    let sent = tokio::spawn(async move {
        tokio::join!(
            sender.send_confirmed(Outgoing::new(to(), "bad").once("bad")),
            sender.send_confirmed(Outgoing::new(to(), "good"))
        )
    });
    let (mut question, code) = (None, "ERR_PERMISSION_DENIED".to_owned());
    while question.is_none() {
        if let Up::TaskQuery(asked) = line.next().await {
            question = Some(asked.request_id);
        }
    }
    let refusal = ErrorResponse { code, request_id: "bad".into(), ..ErrorResponse::default() };
    line.put(Down::Error(refusal.into())).await;
    let reply = TaskQueryResponse { request_id: question.unwrap(), ..TaskQueryResponse::default() };
    line.put(Down::TaskQuery(reply.into())).await;
    let (bad, good) = soon(sent).await.unwrap();
    assert_eq!(bad.unwrap_err().kind(), Kind::Denied);
    good.unwrap();
}

#[tokio::test]
async fn another_server_does_not_know_what_it_has_seen() {
    let mut peer = Peer::begin().await;
    let (agent, mut line) = peer.accept_as(agent(), stock()).await;
    let sender = agent.clone();
    let sent = tokio::spawn(async move { sender.send_confirmed(Outgoing::new(to(), "1")).await });
    assert_eq!(line.text().await, "1");
    line.fail(Status::unavailable("restart")).await;
    peer.line().await.ack(stock()).await;
    assert_eq!(soon(sent).await.unwrap().unwrap_err().kind(), Kind::Interrupted);
}

#[tokio::test]
async fn replies_of_another_server_are_told_by_their_order() {
    let mut peer = Peer::begin().await;
    let (agent, mut line) = peer.accept_as(agent(), stock()).await;
    let ask = |name: &'static str| {
        let admin = agent.admin();
        tokio::spawn(async move { admin.get_workspace(name).await })
    };
    let mut asked = Vec::new();
    for name in ["one", "two", "three"] {
        asked.push(ask(name));
        assert!(matches!(line.next().await, Up::WorkspaceOp(_)));
    }
    for name in ["one", "two"] {
        let workspace = Some(WorkspaceInfo { workspace_id: name.into(), ..WorkspaceInfo::default() });
        let reply = WorkspaceResponse { success: true, workspace, ..WorkspaceResponse::default() };
        line.put(Down::Workspace(reply.into())).await;
    }
    let denied = ErrorResponse { code: "ERR_PERMISSION_DENIED".into(), ..ErrorResponse::default() };
    line.put(Down::Error(denied.into())).await;
    let mut told = Vec::new();
    for ask in asked {
        told.push(soon(ask).await.unwrap().map(|workspace| workspace.workspace_id).map_err(|e| e.kind()));
    }
    assert_eq!(told, [Ok("one".into()), Ok("two".into()), Err(Kind::Denied)]);
}

#[tokio::test]
async fn requests_are_answered_although_nobody_takes_what_comes() {
    let mut peer = Peer::begin().await;
    let (agent, line) = peer.accept(agent().inbox(4)).await;
    let mut messages = agent.messages();
    let (mut up, down) = line.split();
    let frame = |payload| Ok(DownstreamMessage { payload: Some(payload), ..DownstreamMessage::default() });
    for n in 0..16 {
        down.send(frame(message(&n.to_string()))).await.unwrap();
    }
    let answers = tokio::spawn(async move {
        while let Ok(Some(asked)) = up.message().await {
            if let Some(Up::KvOp(asked)) = asked.payload {
                let reply = KvResponse { success: true, request_id: asked.request_id, ..KvResponse::default() };
                down.send(frame(Down::Kv(reply.into()))).await.unwrap();
            }
        }
    });
    soon(agent.kv(Scope::Global).put("k", "v")).await.unwrap();
    for n in 0..16 {
        assert_eq!(soon(messages.next()).await.unwrap().text(), n.to_string());
    }
    soon(agent.close()).await;
    soon(answers).await.unwrap();
}

fn subscribed(client_request_id: String, name: &str) -> Down {
    let reply = TaskSubscriptionOperationResponse {
        success: true,
        client_request_id,
        subscription_id: name.into(),
        ..TaskSubscriptionOperationResponse::default()
    };
    Down::TaskSubscriptionResponse(reply.into())
}

#[tokio::test]
async fn the_workspace_and_what_is_followed_are_taken_up_again() {
    let mut peer = Peer::begin().await;
    let (user, mut line) = peer.accept(User::builder("u", "w").workspace("first").reconnect(quick())).await;
    assert!(matches!(line.next().await, Up::SwitchWorkspace(it) if it.new_workspace_id == "first"));
    let goes = tokio::spawn({
        let user = user.clone();
        async move { user.switch_workspace("second").await }
    });
    assert!(matches!(line.next().await, Up::SwitchWorkspace(_)));
    let Up::TaskQuery(asked) = line.next().await else { panic!("expected a question") };
    let reply = TaskQueryResponse { request_id: asked.request_id, ..TaskQueryResponse::default() };
    line.put(Down::TaskQuery(reply.into())).await;
    soon(goes).await.unwrap().unwrap();
    let tasks = user.tasks();
    let follows = tokio::spawn(async move { tasks.follow("t", true).await });
    let event = |at: i64, name: &str, reason: &str| {
        let change = TaskStatusChangedEvent { reason: reason.into(), ..TaskStatusChangedEvent::default() };
        let event = TaskEvent {
            task_id: "t".into(),
            emitted_at_unix_ms: at,
            subscription_id: name.into(),
            event: Some(task_event::Event::StatusChanged(change)),
            ..TaskEvent::default()
        };
        Down::TaskEvent(event.into())
    };
    let Up::TaskSubscriptionOp(asked) = line.next().await else { panic!("expected a subscription") };
    line.put(subscribed(asked.client_request_id, "s-1")).await;
    line.put(event(10, "s-1", "one")).await;
    line.put(event(10, "s-1", "two")).await;
    let mut events = soon(follows).await.unwrap().unwrap();
    let reason = |event: Option<TaskEvent>| match event.unwrap().event {
        Some(task_event::Event::StatusChanged(change)) => change.reason,
        other => panic!("{other:?}"),
    };
    assert_eq!(reason(soon(events.next()).await), "one");
    line.fail(Status::unavailable("restart")).await;
    let mut line = back(&mut peer).await;
    assert!(matches!(line.next().await, Up::SwitchWorkspace(it) if it.new_workspace_id == "second"));
    let Up::TaskSubscriptionOp(again) = line.next().await else { panic!("expected a subscription") };
    assert_eq!((again.task_id.as_str(), again.recursive, again.start_timestamp_unix_ms), ("t", true, 10));
    line.put(subscribed(again.client_request_id, "s-2")).await;
    for (at, what) in [(10, "one"), (10, "two"), (10, "three"), (11, "four")] {
        line.put(event(at, "s-2", what)).await;
    }
    for expected in ["two", "three", "four"] {
        assert_eq!(reason(soon(events.next()).await), expected, "once each");
    }
    drop(events);
    assert!(matches!(line.next().await, Up::TaskSubscriptionOp(end) if end.subscription_id == "s-2"));
}

#[tokio::test]
async fn a_subscription_that_nobody_wants_is_ended_once() {
    let mut peer = Peer::begin().await;
    let (agent, mut line) = peer.agent().await;
    let tasks = agent.tasks();
    let follows = tokio::spawn(async move { tasks.follow("t", false).await });
    let Up::TaskSubscriptionOp(asked) = line.next().await else { panic!("expected a subscription") };
    line.put(subscribed(asked.client_request_id, "s-2")).await;
    drop(soon(follows).await.unwrap().unwrap());
    assert!(matches!(line.next().await, Up::TaskSubscriptionOp(end) if end.subscription_id == "s-2"));
    line.put(subscribed(String::new(), "s-2")).await;
    // One that nobody waits for any more when it is answered.
    let tasks = agent.tasks();
    let abandoned = tokio::spawn(async move { tasks.follow("t", false).await.map(drop) });
    let Up::TaskSubscriptionOp(asked) = line.next().await else { panic!("expected a subscription") };
    abandoned.abort();
    assert!(abandoned.await.unwrap_err().is_cancelled());
    line.put(subscribed(asked.client_request_id, "s-3")).await;
    assert!(matches!(line.next().await, Up::TaskSubscriptionOp(end) if end.subscription_id == "s-3"));
    line.put(subscribed(String::new(), "s-3")).await;
    let settles = tokio::spawn(async move { agent.settled().await });
    let Up::TaskQuery(asked) = line.next().await else { panic!("it was told once") };
    let reply = TaskQueryResponse { request_id: asked.request_id, ..TaskQueryResponse::default() };
    line.put(Down::TaskQuery(reply.into())).await;
    soon(settles).await.unwrap().unwrap();
}

#[tokio::test]
async fn closing_sends_what_is_queued_and_dropping_does_so_too() {
    for explicit in [true, false] {
        let mut peer = Peer::begin().await;
        let (agent, mut line) = peer.agent().await;
        for n in 0..100 {
            agent.send(Outgoing::new(to(), n.to_string())).await.unwrap();
        }
        let closes = tokio::spawn(async move {
            if explicit {
                assert_eq!(agent.close().await, 0);
                assert_eq!(agent.send(Outgoing::new(to(), "late")).await.unwrap_err().kind(), Kind::Closed);
            } else {
                drop(agent);
            }
        });
        for n in 0..100 {
            assert_eq!(line.text().await, n.to_string());
        }
        assert!(line.ended().await);
        drop(line);
        soon(closes).await.unwrap();
    }
}

#[tokio::test]
async fn a_handler_that_fails_or_panics_is_given_the_message_again() {
    let mut peer = Peer::begin().await;
    let (agent, line) = peer.agent().await;
    let (seen, mut saw) = tokio::sync::mpsc::channel(16);
    let mut times = 0;
    agent.on_message(move |message| {
        times += 1;
        let (seen, times) = (seen.clone(), times);
        async move {
            seen.send(message.text().into_owned()).await.unwrap();
            match times {
                1 => Err("not yet"),
                2 => panic!("a defect"),
                _ => Ok(()),
            }
        }
    });
    line.put(message("one")).await;
    line.put(message("two")).await;
    for expected in ["one", "one", "one", "two"] {
        assert_eq!(soon(saw.recv()).await.unwrap(), expected);
    }
    drop(line);
}

#[tokio::test]
async fn what_is_to_be_said_again_survives_a_second_break() {
    let mut peer = Peer::begin().await;
    let (agent, mut line) = peer.agent().await;
    let sender = agent.clone();
    let sent = tokio::spawn(async move { sender.send_confirmed(Outgoing::new(to(), "1")).await });
    assert_eq!(line.text().await, "1");
    line.fail(Status::unavailable("restart")).await;
    // Some of these end before the client has said anything.
    for _ in 0..20 {
        let line = peer.line().await;
        line.ack(ConnectionAck { resumed: true, ..trunkline() }).await;
        line.fail(Status::unavailable("again")).await;
    }
    let mut line = back(&mut peer).await;
    assert_eq!(line.text().await, "1");
    let Up::TaskQuery(asked) = line.next().await else { panic!("expected a question") };
    let reply = TaskQueryResponse { request_id: asked.request_id, ..TaskQueryResponse::default() };
    line.put(Down::TaskQuery(reply.into())).await;
    soon(sent).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_burst_is_received_whole_and_in_order() {
    let mut peer = Peer::begin().await;
    let (agent, line) = peer.agent().await;
    let mut messages = agent.messages();
    let puts = tokio::spawn(async move {
        for n in 0..5000 {
            line.put(message(&n.to_string())).await;
        }
        line
    });
    for n in 0..5000 {
        assert_eq!(soon(messages.next()).await.unwrap().text(), n.to_string());
    }
    soon(puts).await.unwrap();
}
