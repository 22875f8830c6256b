//! The vectors that every implementation of the protocol answers to: conformance/agent-socket.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::{fs, path::Path};

use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde_json::Value;
use trunkline_agent_socket::{
    Envelope, LocalUiState, ParseError, RuntimeState, StaleUi, Type, detect_stale_ui, link::join, make, parse,
    serialize, should_clear_thinking,
};

fn vectors<T: DeserializeOwned>(name: &str) -> T {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../conformance/agent-socket");
    serde_json::from_str(&fs::read_to_string(dir.join(name)).unwrap()).unwrap()
}

fn read(value: &Value) -> Envelope {
    parse(value.to_string().as_bytes()).unwrap()
}

fn written(envelope: &Envelope) -> Value {
    serde_json::from_str(&serialize(envelope)).unwrap()
}

/// What a frame says, without what says nothing.
fn normal(frame: &str) -> Value {
    let mut value: Value = serde_json::from_str(frame).unwrap();
    let fields = value.as_object_mut().unwrap();
    fields.retain(|_, value| !value.is_null());
    let ts = fields["ts"].as_f64().unwrap() as i64;
    fields.insert("ts".to_owned(), ts.into());
    value
}

#[test]
fn envelopes_are_read_and_written() {
    #[derive(serde::Deserialize)]
    struct Vectors {
        good: Vec<String>,
        bad: Vec<Bad>,
    }
    #[derive(serde::Deserialize)]
    struct Bad {
        frame: String,
        field: String,
    }
    let Vectors { good, bad } = vectors("envelopes.json");
    for frame in good {
        let envelope = parse(frame.as_bytes()).unwrap_or_else(|e| panic!("{frame}: {e}"));
        assert_eq!(written(&envelope), normal(&frame));
        assert_eq!(parse(serialize(&envelope).as_bytes()).unwrap(), envelope);
    }
    for Bad { frame, field } in bad {
        let error = parse(frame.as_bytes()).unwrap_err();
        let named = match &error {
            ParseError::NoObject(_) => "frame",
            ParseError::Protocol => "protocol",
            ParseError::Version => "version",
            ParseError::Field { field, .. } => field,
        };
        assert_eq!(named, field, "{frame}");
        assert!(field == "frame" || error.to_string().starts_with(&field), "{error}");
    }
    assert!(parse(b"\xff").is_err());
}

#[test]
fn there_are_thirty_one_types() {
    assert_eq!(Type::ALL.len(), 31);
    for kind in Type::ALL {
        assert_eq!(kind.as_str().parse(), Ok(*kind));
    }
    let said_once: Vec<_> = Type::ALL.iter().filter(|kind| !kind.is_event()).map(|kind| kind.as_str()).collect();
    let expected = "hello welcome heartbeat ack state_request state_snapshot replay_request replay_events";
    assert_eq!(said_once.join(" "), expected);
}

#[test]
fn what_a_ui_shows_is_compared_by_the_table() {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Case {
        local: LocalUiState,
        state: RuntimeState,
        detected: StaleUi,
        clear_thinking: bool,
    }
    for Case { local, state, detected, clear_thinking } in vectors::<Vec<Case>>("stale.json") {
        assert_eq!(detect_stale_ui(&local, &state), detected, "{local:?} {state:?}");
        assert_eq!(should_clear_thinking(&local, &state), clear_thinking, "{local:?} {state:?}");
    }
}

#[test]
fn the_state_follows_from_the_events() {
    #[derive(serde::Deserialize)]
    struct Case {
        name: String,
        events: Vec<Value>,
        state: Value,
    }
    for Case { name, events, state } in vectors::<Vec<Case>>("folds.json") {
        let mut folded = RuntimeState::default();
        events.iter().for_each(|event| folded.apply(&read(event)));
        assert_eq!(serde_json::to_value(&folded).unwrap(), state, "{name}");
        assert_eq!(serde_json::from_value::<RuntimeState>(state).unwrap(), folded, "{name}");
    }
}

#[test]
fn pieces_of_one_text_are_joined() {
    #[derive(serde::Deserialize)]
    struct Case {
        events: Vec<Value>,
        bytes: usize,
        joined: Vec<Value>,
    }
    for Case { events, bytes, joined } in vectors::<Vec<Case>>("joins.json") {
        let found: Vec<_> = join(events.iter().map(read).collect(), bytes).iter().map(written).collect();
        assert_eq!(found, joined);
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-z\"\\\\é\u{1}]{0,8}".prop_map(Value::from),
    ];
    let names = prop_oneof![Just("name"), Just("phase"), Just("approved"), Just("input"), Just("delta"), Just("to")];
    leaf.prop_recursive(3, 16, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(names.clone(), inner, 0..4)
                .prop_map(|map| map.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()),
        ]
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        kind in prop::sample::select(Type::ALL),
        texts in prop::array::uniform5(prop::option::of("[a-z\"\\\\é\n\u{1}]{0,12}")),
        numbers in prop::array::uniform2(prop::option::of(0..(1_u64 << 53))),
        ts in any::<i64>(),
        payload in any_json(),
    ) {
        let mut envelope = make(kind, &payload, Default::default()).unwrap();
        let [client_id, socket_id, runtime_generation, turn_id, operation_id] = texts;
        envelope = Envelope { client_id, socket_id, runtime_generation, turn_id, operation_id, ts, ..envelope };
        [envelope.seq, envelope.ack] = numbers;
        envelope.extra.add("later", &payload);
        let read = parse(serialize(&envelope).as_bytes()).unwrap();
        prop_assert_eq!(&read, &envelope);
        prop_assert_eq!(read.value(), payload.clone());
        prop_assert_eq!(read.extra.get("later"), Some(payload));
        let mut state = RuntimeState::default();
        state.apply(&read);
    }

    #[test]
    fn nothing_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), text in "[{}\":,a-z0-9\\\\]{0,80}") {
        let _ = parse(&bytes);
        let _ = parse(text.as_bytes());
    }

    /// However the stream is cut into batches, the text is the same, and so is the state.
    #[test]
    fn joining_changes_nothing_but_the_number_of_pieces(
        events in prop::collection::vec((0..4_u8, 0..2_u8, "[a-z]{0,4}"), 0..40),
        cut in 0..40_usize,
    ) {
        let event = |(seq, (kind, turn, text)): (usize, (u8, u8, String))| {
            let kind = if kind == 0 { Type::TurnPhase } else { Type::TurnTextDelta };
            let mut envelope = make(kind, &serde_json::json!({"delta": text}), trunkline_agent_socket::Meta {
                turn_id: Some(turn.to_string()), seq: Some(seq as u64 + 1), ts: Some(seq as i64), ..Default::default()
            }).unwrap();
            envelope.client_id = Some("c".to_owned());
            envelope
        };
        let events: Vec<_> = events.into_iter().enumerate().map(event).collect();
        let (first, second) = events.split_at(cut.min(events.len()));
        let joined: Vec<_> = join(first.to_vec(), 16).into_iter().chain(join(second.to_vec(), 16)).collect();
        let (mut plain, mut shorter) = (RuntimeState::default(), RuntimeState::default());
        events.iter().for_each(|event| plain.apply(event));
        joined.iter().for_each(|event| shorter.apply(event));
        // Pieces that were joined are seen at once, so a turn that they begin begins with the last of them.
        if let (Some(plain), Some(shorter)) = (&mut plain.active_turn, &mut shorter.active_turn) {
            (plain.started_at, shorter.started_at) = (None, None);
        }
        prop_assert_eq!(plain, shorter);
        let text = |events: &[Envelope]| -> Vec<(Option<String>, Type, String)> {
            let mut out: Vec<(Option<String>, Type, String)> = Vec::new();
            for event in events {
                let delta = event.value()["delta"].as_str().unwrap().to_owned();
                match out.last_mut() {
                    Some((turn, Type::TurnTextDelta, text))
                        if *turn == event.turn_id && event.kind == Type::TurnTextDelta => text.push_str(&delta),
                    _ => out.push((event.turn_id.clone(), event.kind, delta)),
                }
            }
            out
        };
        prop_assert_eq!(text(&joined), text(&events));
        prop_assert_eq!(joined.last().and_then(|event| event.seq), events.last().and_then(|event| event.seq));
        prop_assert!(joined.windows(2).all(|pair| pair[0].seq < pair[1].seq));
    }
}
