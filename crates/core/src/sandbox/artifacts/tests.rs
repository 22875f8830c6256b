use std::collections::BTreeMap;

use proptest::{prelude::*, sample::select};
use serde_json::{Map, Value, json, value::to_raw_value};

use super::{Artifact, Change, Event, Fold, How, Kept};

fn fold(events: &[Value]) -> Fold {
    let mut fold = Fold::default();
    fold.apply(read(events), 1);
    fold
}

/// Events as they come, but for what is the same in JSON.
fn read(events: &[Value]) -> Vec<Event> {
    events.iter().map(|event| Event::read(&to_raw_value(event).unwrap())).collect()
}

/// An artifact's own fields.
fn fields(artifact: &Artifact) -> Value {
    serde_json::to_value(&artifact.fields).unwrap()
}

fn all(fold: &Fold) -> Vec<Artifact> {
    fold.artifacts().map(|artifact| (**artifact).clone()).collect()
}

/// What a client has that applies what it is told.
#[derive(Default)]
struct Screen(BTreeMap<u64, Value>);

impl Screen {
    fn hear(&mut self, changes: &[Change]) {
        for change in changes {
            match change {
                Change::Created(artifact) => {
                    self.0.insert(artifact.seq, serde_json::to_value(&**artifact).unwrap());
                }
                Change::Updated(update) => {
                    let artifact = self.0.get_mut(&update.seq).unwrap().as_object_mut().unwrap();
                    match &update.how {
                        How::Set(value) => {
                            artifact.insert(update.field.clone(), serde_json::to_value(value).unwrap());
                        }
                        How::Append(more) => {
                            let Some(Value::String(text)) = artifact.get_mut(&update.field) else {
                                unreachable!("{update:?} of {artifact:?}")
                            };
                            text.push_str(more);
                        }
                    }
                    artifact.insert("updatedAt".to_owned(), update.updated_at.into());
                }
            }
        }
    }
}

#[test]
fn a_turn_as_agents_tell_it() {
    let fold = fold(&[
        json!({"type": "user_prompt", "text": "fix the bug"}),
        json!({"type": "turn_start", "turnId": "t1", "model": "m"}),
        json!({"type": "thinking_delta", "delta": "hm"}),
        json!({"type": "text_delta", "delta": "I loo"}),
        json!({"type": "text_delta", "delta": "k."}),
        json!({"type": "tool_start", "id": "c1", "name": "read", "input": {"path": "a"}, "status": "mine"}),
        json!({"type": "tool_output_delta", "id": "c1", "delta": "line"}),
        json!({"type": "tool_end", "id": "c1", "result": "ok"}),
        json!({"type": "text_delta", "delta": "Done"}),
        json!({"type": "text", "text": "Done."}),
        json!({"type": "tool_start", "id": "c2", "name": "sh"}),
        json!({"type": "nobody_knows", "x": 1}),
        json!({"type": "turn_end"}),
    ]);
    let told: Vec<_> = fold.artifacts().map(|a| (a.seq, &*a.kind, &*a.id, &*a.status)).collect();
    let expected = [
        (1, "user_prompt", "user_prompt-1", "done"),
        (2, "turn", "t1", "done"),
        (3, "thinking", "thinking-3", "done"),
        (4, "text", "text-4", "done"),
        (5, "tool", "c1", "done"),
        (6, "text", "text-6", "done"),
        (7, "tool", "c2", "interrupted"),
        (8, "custom", "custom-8", "done"),
    ];
    assert_eq!(told, expected);
    let artifacts = all(&fold);
    assert_eq!(fields(&artifacts[3])["text"], "I look.");
    assert_eq!(fields(&artifacts[5])["text"], "Done.");
    assert_eq!(
        fields(&artifacts[4]),
        json!({
            "name": "read", "input": {"path": "a"}, "output": "line", "result": "ok", "extra": {"status": "mine"},
        })
    );
    assert_eq!(fields(&artifacts[7]), json!({"type": "nobody_knows", "data": {"x": 1}}));
}

#[test]
fn questions_are_answered_and_approvals_decided() {
    let artifacts = all(&fold(&[
        json!({"type": "question", "id": "q", "text": "which?", "options": ["a", "b"]}),
        json!({"type": "approval_request", "action": "rm"}),
        json!({"type": "answer", "id": "q", "text": "a"}),
        json!({"type": "approval", "approved": false, "by": "ann"}),
        json!({"type": "answer", "id": "lost", "text": "c"}),
    ]));
    let told: Vec<_> = artifacts.iter().map(|a| (&*a.kind, &*a.status)).collect();
    assert_eq!(told, [("question", "answered"), ("approval", "denied"), ("question", "answered")]);
    let (question, approval) = (fields(&artifacts[0]), fields(&artifacts[1]));
    assert_eq!((&question["answer"], &approval["by"]), (&json!("a"), &json!("ann")));
}

#[test]
fn who_comes_back_gets_what_it_does_not_know() {
    let mut fold = fold(&[
        json!({"type": "tool_start", "id": "a"}),
        json!({"type": "tool_start", "id": "b"}),
        json!({"type": "user_prompt", "text": "1"}),
        json!({"type": "tool_output_delta", "id": "a", "delta": "late"}),
        json!({"type": "user_prompt", "text": "2"}),
    ]);
    let seqs = |fold: &Fold, seq| {
        let (found, rest) = fold.walk(fold.wanted(seq), 1, usize::MAX);
        assert_eq!(rest, None);
        found.iter().map(|artifact| artifact.seq).collect::<Vec<_>>()
    };
    assert_eq!(seqs(&fold, 3), [1, 3, 4], "the first changed after the third came to be");
    assert_eq!(seqs(&fold, 4), [4]);
    assert_eq!(seqs(&fold, 1), [1, 2, 3, 4]);
    assert_eq!((seqs(&fold, 0).len(), seqs(&fold, 99).len()), (4, 4), "numbers that mean nothing");
    fold.apply(read(&[json!({"type": "turn_end"})]), 9);
    assert_eq!(seqs(&fold, 4), [1, 2, 4], "the end of the turn ended the tools");
}

#[test]
fn a_piece_means_the_same_however_it_is_read() {
    let (mut pieces, mut both) = (0, [Fold::default(), Fold::default()]);
    for kind in ["text_delta", "thinking_delta", "tool_input_delta", "tool_output_delta", "other_delta", "text_delta2"]
    {
        for rest in [
            r#","delta":"a\n\u00e4\ud83d\ude00""#,
            r#","delta":"b","id":"1""#,
            r#","id":"1","delta":"c""#,
            r#","delta":"d","id":"""#,
            r#","delta":"e","id":7"#,
            r#","delta":"f","id":null"#,
            r#","delta":"g","id":"\u0041""#,
            r#","delta":"h","more":1"#,
            r#","delta":"i","delta":"j""#,
            r#","delta":"k","type":"text_delta""#,
            r#","delta":7"#,
            r#","delta":null"#,
            r#","text":"l""#,
            r#","delta":"\ud83d""#,
            "",
        ] {
            for told in [format!(r#"{{"type":"{kind}"{rest}}}"#), format!(r#" {{ "type" : "{kind}"{rest}}}"#)] {
                let told = serde_json::value::RawValue::from_string(told).unwrap();
                let read = Event::read(&told);
                pieces += usize::from(matches!(read, Event::Piece(..)));
                let [one, other] = &mut both;
                one.apply([read], 1);
                other.apply([Event::read_any(&told)], 1);
                assert_eq!(all(one), all(other), "{}", told.get());
                assert_eq!((one.rest(), one.bytes()), (other.rest(), other.bytes()), "{}", told.get());
            }
        }
    }
    assert_eq!(pieces, 4 * 5, "of each type, those that are nothing else");
}

#[test]
fn an_event_is_read_for_itself_whatever_is_in_it() {
    let told = [
        r#"{"type": "text", "text": "a"}"#,
        r#"{"type": "u", "cost": 1e999, "n": 12345678901234567890123}"#,
        &format!(r#"{{"type": "u", "deep": {}1{}}}"#, "[".repeat(500), "]".repeat(500)),
        &format!("{}{}", "[".repeat(200), "]".repeat(200)),
        "{\"type\": \"u\",\n \"lines\": [\n1,\r\n2]}",
        r#"{"type": "text", "id": 1e999, "text": "b"}"#,
        "1e999",
    ];
    let told: Vec<_> =
        told.iter().map(|told| serde_json::value::RawValue::from_string((*told).to_owned()).unwrap()).collect();
    let mut fold = Fold::default();
    fold.apply(told.iter().map(|told| Event::read(told)), 1);
    let artifacts: Vec<Value> = all(&fold)
        .iter()
        .map(|artifact| {
            let json = serde_json::to_string(artifact).unwrap();
            assert!(!json.contains('\n'), "one line: {json}");
            serde_json::from_str(&json).unwrap()
        })
        .collect();
    assert_eq!(artifacts.len(), told.len());
    assert_eq!(artifacts[0]["text"], "a");
    assert_eq!((&artifacts[1]["type"], &artifacts[1]["data"]["cost"]), (&json!("u"), &json!("1e999")));
    let exact = serde_json::to_string(&all(&fold)[1]).unwrap();
    assert!(exact.contains("\"n\":12345678901234567890123"), "{exact}");
    assert_eq!(artifacts[2]["data"]["deep"].as_str().unwrap().len(), 1001);
    assert_eq!((&artifacts[3]["type"], artifacts[3]["data"].as_str().unwrap().len()), (&Value::Null, 400));
    assert_eq!(artifacts[4]["data"]["lines"], json!([1, 2]));
    assert_eq!((&artifacts[5]["id"], &artifacts[5]["text"]), (&json!("1e999"), &json!("b")));
    assert_eq!(artifacts[6]["data"], "1e999");
}

/// One request may be about as many artifacts as it has events, or as many fields.
#[test]
fn a_fold_takes_time_by_the_number_of_events() {
    const COUNT: usize = 10_000;
    let ids =
        |kind: &str| (0..COUNT).map(|n| json!({"type": kind, "id": n.to_string(), "delta": "x"})).collect::<Vec<_>>();
    let took = |fold: &mut Fold, events: &[Value]| {
        let (events, begun) = (read(events), std::time::Instant::now());
        assert_eq!(fold.apply(events, 1).len(), COUNT);
        begun.elapsed()
    };
    let mut fold = fold(&ids("tool_output_delta"));
    let few: Vec<_> = std::iter::repeat_n(ids("tool_output_delta"), 2).flatten().collect();
    let round_robin = took(&mut fold, &few);
    let fields: Map<String, Value> = (0..COUNT).map(|n| (format!("f{n}"), n.into())).collect();
    fold.apply(read(&[json!({"type": "plan", "id": "p", "f0": null})]), 1);
    let plan = |more: usize| {
        let mut plan = fields.clone();
        plan.extend([
            ("type".to_owned(), json!("plan")),
            ("id".to_owned(), json!("p")),
            ("f0".to_owned(), json!(more)),
        ]);
        Value::Object(plan)
    };
    let many_fields = took(&mut fold, &[plan(1), plan(2)]);
    // It was 10^8 comparisons each, more than ten seconds without optimization.
    assert!(round_robin + many_fields < std::time::Duration::from_secs(3), "{round_robin:?} {many_fields:?}");
}

#[test]
fn what_is_kept_in_extra_has_an_end() {
    let half = "x".repeat(super::EXTRA_BYTES_MAX / 2);
    let artifacts = all(&fold(&[
        json!({"type": "status", "id": "s", "kind": half, "seq": 1}),
        json!({"type": "status", "id": "s", "createdAt": half, "seq": 2}),
    ]));
    let shown = fields(&artifacts[0]);
    assert_eq!((&shown["extra"]["kind"], &shown["extra"]["seq"]), (&json!(half), &json!(2)));
    assert_eq!((shown["extra"].get("createdAt"), &shown["truncated"]), (None, &json!(true)));
}

#[test]
fn text_has_an_end() {
    let long = "ä".repeat(super::TEXT_BYTES_MAX / 4);
    let artifacts = all(&fold(&[
        json!({"type": "text_delta", "delta": "x"}),
        json!({"type": "text_delta", "delta": long}),
        json!({"type": "text_delta", "delta": long}),
        json!({"type": "text_delta", "delta": "y"}),
    ]));
    let text = artifacts[0].fields["text"].as_text().unwrap();
    assert_eq!((text.len(), fields(&artifacts[0])["truncated"].as_bool()), (super::TEXT_BYTES_MAX - 1, Some(true)));
}

#[test]
fn an_artifact_has_an_end_whatever_it_is_made_of() {
    let large = vec![json!(1); 500_000];
    let mut fold = Fold::default();
    for n in 0..20 {
        fold.apply(read(&[json!({"type": "tool_start", "id": "t", format!("field{n}"): large})]), 1);
    }
    let tool = all(&fold).remove(0);
    assert_eq!((tool.fields.len(), &fields(&tool)["truncated"]), (11, &json!(true)));
    assert!(tool.bytes() < 10_100_000, "{}", tool.bytes());
    assert_eq!(fold.bytes(), tool.bytes());
    // What is there may be another, and what is no longer may become it.
    fold.apply(read(&[json!({"type": "tool_start", "id": "t", "field0": [], "field19": large})]), 1);
    let tool = all(&fold).remove(0);
    assert_eq!((&fields(&tool)["field0"], fields(&tool)["field19"].is_array()), (&json!([]), true));
    // So it is with texts that grow.
    let mut fold = self::fold(&[json!({"type": "tool_start", "id": "t"})]);
    for n in 0..7 {
        fold.apply(read(&[json!({"type": "tool_start", "id": "t", format!("field{n}"): large})]), 1);
    }
    for _ in 0..50 {
        let delta = json!({"type": "tool_output_delta", "id": "t", "delta": "x".repeat(100_000)});
        fold.apply(read(&[delta]), 1);
    }
    let tool = all(&fold).remove(0);
    assert_eq!(fields(&tool)["truncated"], true);
    assert!(tool.bytes() <= 10 * 1024 * 1024 + 1024 && fold.bytes() == tool.bytes(), "{}", tool.bytes());
}

#[test]
fn what_changed_is_as_large_as_all_of_its_fields() {
    let large = vec![json!(1); 500_000];
    let mut fold = fold(&[json!({"type": "tool_start", "id": "t", "a": large, "b": "text", "seq": 3})]);
    let kept = fold.events();
    assert_eq!(fold.bytes_since(kept), 0);
    fold.apply(read(&[json!({"type": "tool_start", "id": "t", "c": 1})]), 1);
    assert!((1_000_000..1_000_100).contains(&fold.bytes_since(kept)), "{}", fold.bytes_since(kept));
}

/// Any JSON.
fn anything() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-zä]{0,6}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(name(), inner, 0..4)
                .prop_map(|map| map.into_iter().collect::<Map<_, _>>().into()),
        ]
    })
}

fn name() -> impl Strategy<Value = String> {
    const KNOWN: [&str; 11] =
        ["id", "text", "delta", "name", "input", "output", "error", "result", "status", "turnId", "extra"];
    prop_oneof![select(&KNOWN[..]).prop_map(str::to_owned), "[a-z]{1,3}"]
}

/// Events as they may come, and some that should not.
fn event() -> impl Strategy<Value = Value> {
    const TYPES: [&str; 24] = [
        "user_prompt",
        "text_delta",
        "text_delta",
        "text",
        "thinking_delta",
        "tool_start",
        "tool_input_delta",
        "tool_output_delta",
        "tool_end",
        "file_change",
        "plan",
        "question",
        "answer",
        "approval_request",
        "approval",
        "usage",
        "error",
        "summary",
        "turn_start",
        "turn_end",
        "status",
        "heartbeat",
        "thinking",
        "unheard_of",
    ];
    let fields = prop::collection::btree_map(name(), anything(), 0..4);
    let id = prop::option::weighted(0.4, select(&["a", "b", "text-1"][..]));
    let told = (select(&TYPES[..]), fields, id, "[a-z ]{0,5}").prop_map(|(kind, fields, id, delta)| {
        let mut event: Map<String, Value> = fields.into_iter().collect();
        event.insert("type".into(), kind.into());
        id.map(|id| event.insert("id".into(), id.into()));
        if kind.ends_with("delta") {
            event.insert("delta".into(), delta.into());
        }
        Value::Object(event)
    });
    prop_oneof![9 => told, 1 => anything()]
}

/// The same, with its delta in two pieces.
fn split(event: &Value, at: usize) -> Vec<Value> {
    let delta = event.get("delta").and_then(Value::as_str);
    let is_delta = event.get("type").and_then(Value::as_str).is_some_and(|kind| kind.ends_with("_delta"));
    let (Some(delta), true) = (delta, is_delta) else { return vec![event.clone()] };
    let with = |piece: &str| {
        let mut event = event.clone();
        event["delta"] = piece.into();
        event
    };
    let at = delta.floor_char_boundary(at.min(delta.len()));
    vec![with(&delta[..at]), with(&delta[at..])]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn numbers_have_no_holes_whatever_comes(events in prop::collection::vec(event(), 0..40)) {
        let fold = fold(&events);
        for (at, artifact) in fold.artifacts().enumerate() {
            prop_assert_eq!(artifact.seq, at as u64 + 1);
        }
        prop_assert_eq!(fold.events(), events.len() as u64);
        prop_assert_eq!(fold.bytes(), fold.artifacts().map(|artifact| artifact.bytes()).sum::<usize>());
    }

    #[test]
    fn how_deltas_are_cut_makes_no_difference(
        events in prop::collection::vec((event(), 0..6_usize), 0..40),
    ) {
        let whole: Vec<_> = events.iter().map(|(event, _)| event.clone()).collect();
        let cut: Vec<_> = events.iter().flat_map(|(event, at)| split(event, *at)).collect();
        prop_assert_eq!(all(&fold(&whole)), all(&fold(&cut)));
    }

    #[test]
    fn what_was_there_and_what_changed_is_what_there_is(
        batches in prop::collection::vec(prop::collection::vec(event(), 0..6), 0..12),
        from in 0..12_usize,
    ) {
        let (mut fold, mut screen) = (Fold::default(), Screen::default());
        for (at, batch) in batches.iter().enumerate() {
            if at == from {
                for artifact in fold.artifacts() {
                    screen.hear(&[Change::Created(artifact.clone())]);
                }
            }
            let changes = fold.apply(read(batch), at as i64);
            if at >= from {
                screen.hear(&changes);
            }
        }
        if from < batches.len() {
            let shown: Vec<_> = screen.0.into_values().collect();
            let all: Vec<_> = fold.artifacts().map(|artifact| serde_json::to_value(&**artifact).unwrap()).collect();
            prop_assert_eq!(shown, all);
        }
    }

    #[test]
    fn a_checkpoint_goes_on_as_if_nothing_had_been(
        before in prop::collection::vec(event(), 0..20),
        after in prop::collection::vec(event(), 0..20),
    ) {
        let mut whole = fold(&before);
        let kept: Vec<Kept> = whole.changed_since(0).collect();
        let rest = serde_json::from_value(serde_json::to_value(whole.rest()).unwrap()).unwrap();
        let reread = kept.into_iter().map(|kept| {
            let text = serde_json::to_string(&*kept.artifact).unwrap();
            Kept { artifact: Artifact::parse(&text).unwrap().into(), ..kept }
        });
        let mut restored = Fold::restore(reread.collect(), rest);
        prop_assert_eq!(restored.bytes(), whole.bytes());
        prop_assert_eq!(whole.apply(read(&after), 2), restored.apply(read(&after), 2));
        prop_assert_eq!(all(&whole), all(&restored));
    }
}
