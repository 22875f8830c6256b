//! The three streams: without gap or duplicate, whatever happens meanwhile.

use std::time::Duration;

use serde_json::{Value, json};

use super::{Screen, Web, server};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn viewers_that_come_at_any_time_see_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let web = Web::new(server.addresses().http);
    web.make("s").await;
    let teller = web.clone();
    let telling = tokio::spawn(async move {
        for turn in 0..60 {
            let events = json!([
                {"type": "turn_start", "turnId": format!("t{turn}")},
                {"type": "text_delta", "delta": "Hel"},
                {"type": "text_delta", "delta": "lo"},
                {"type": "tool_start", "id": format!("c{turn}"), "name": "sh"},
            ]);
            teller.tell("s", events).await;
            for n in 0..5 {
                let output = json!({"type": "tool_output_delta", "id": format!("c{turn}"), "delta": format!("{n}\n")});
                teller.tell("s", output).await;
            }
            teller
                .tell(
                    "s",
                    json!([{"type": "tool_end", "id": format!("c{turn}"), "result": turn}, {"type": "turn_end"}]),
                )
                .await;
        }
        teller.tell("s", json!({"type": "user_prompt", "id": "last", "text": "the end"})).await;
    });
    let mut viewers = Vec::new();
    for n in 0..20 {
        let web = web.clone();
        viewers.push(tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(n * 20)).await;
            let (mut events, mut screen) = (web.open("/sessions/s/stream").await, Screen::default());
            loop {
                let event = events.next().await.expect("the stream goes on");
                screen.hear(&event);
                if event.data["artifact"]["id"] == "last" {
                    return screen.shows();
                }
            }
        }));
    }
    telling.await.unwrap();
    let all = web.artifacts("s").await;
    assert_eq!(all.len(), 60 * 3 + 1);
    for viewer in viewers {
        assert_eq!(viewer.await.unwrap(), all);
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_back_is_sent_what_it_missed_and_what_changed() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let web = Web::new(server.addresses().http);
    web.make("s").await;
    web.tell(
        "s",
        json!([
            {"type": "tool_start", "id": "a", "name": "sh"},
            {"type": "user_prompt", "text": "1"},
            {"type": "user_prompt", "text": "2"},
            {"type": "tool_output_delta", "id": "a", "delta": "late"},
            {"type": "user_prompt", "text": "3"},
        ]),
    )
    .await;
    let seqs = async |last: Option<&str>| {
        let mut events = web.open_after("/sessions/s/stream", last).await;
        let mut seqs = Vec::new();
        while seqs.last() != Some(&4) {
            let event = events.expect("artifact_snapshot").await;
            seqs.push(event.data["artifact"]["seq"].as_u64().unwrap());
        }
        seqs
    };
    assert_eq!(seqs(None).await, [1, 2, 3, 4]);
    assert_eq!(seqs(Some("3")).await, [1, 3, 4], "the first changed after the third came to be");
    assert_eq!(seqs(Some("4")).await, [4]);
    for unknown in ["0", "99", "x", "-1"] {
        assert_eq!(seqs(Some(unknown)).await, [1, 2, 3, 4], "{unknown}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_saw_a_removed_session_is_told_when_it_sees_another_of_that_id() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let web = Web::new(server.addresses().http);
    let prompts = async |texts: &[&str]| {
        web.make("s").await;
        let told: Vec<_> = texts.iter().map(|text| json!({"type": "user_prompt", "text": text})).collect();
        web.tell("s", json!(told)).await;
    };
    prompts(&["old 1", "old 2", "old 3"]).await;
    let mut viewer = web.open("/sessions/s/stream").await;
    let mut last = String::new();
    for _ in 0..3 {
        last = viewer.expect("artifact_snapshot").await.id;
    }
    assert_eq!(web.delete("/sessions/s").await.0, 204);
    assert_eq!(viewer.expect("session_removed").await.data, json!({"id": "s"}));
    assert!(viewer.next().await.is_none());
    prompts(&["new 1"]).await;
    // By the id of what it saw last, it is told.
    let mut viewer = web.open_after("/sessions/s/stream", Some(&last)).await;
    assert_eq!(viewer.expect("session_removed").await.data, json!({"id": "s"}));
    let shown = viewer.expect("artifact_snapshot").await;
    assert_eq!(shown.data["artifact"]["text"], "new 1");
    assert_ne!(shown.id, "1.0");
    // Those who saw this one, or say no more than a number, are not.
    for known in [&*shown.id, "1", "1.x", "x.1"] {
        let mut viewer = web.open_after("/sessions/s/stream", Some(known)).await;
        assert_eq!(viewer.expect("artifact_snapshot").await.id, shown.id, "{known}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_viewer_holds_nobody_up_and_misses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let web = Web::new(server.addresses().http);
    web.make("s").await;
    let mut slow = web.open("/sessions/s/stream").await;
    let (mut quick, mut screen) = (web.open("/sessions/s/stream").await, Screen::default());
    let piece = "x".repeat(20_000);
    for n in 0..1500 {
        let events = json!([{"type": "tool_output_delta", "id": format!("c{}", n % 50), "delta": piece}]);
        web.tell("s", events).await;
        while screen.0.values().map(|a| a["output"].as_str().unwrap().len()).sum::<usize>() < (n + 1) * piece.len() {
            screen.hear(&quick.next().await.unwrap());
        }
    }
    web.tell("s", json!({"type": "user_prompt", "id": "last", "text": "the end"})).await;
    let mut shown = Screen::default();
    let mut is_caught_up = false;
    while shown.0.values().all(|artifact| artifact["id"] != "last") {
        let event = slow.next().await.expect("the stream goes on");
        is_caught_up |= event.name == "artifact_snapshot";
        shown.hear(&event);
    }
    // The last news may come before what it missed.
    let all = web.artifacts("s").await;
    while shown.shows() != all {
        shown.hear(&slow.next().await.expect("the stream goes on"));
    }
    assert!(is_caught_up, "what it missed was told as it is: nothing was there when it came");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn artifacts_are_compressed_for_clients_that_take_them_so() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let web = Web::new(server.addresses().http);
    web.make("s").await;
    for _ in 0..50 {
        web.tell("s", json!([{"type": "user_prompt", "text": "again and again ".repeat(10)}])).await;
    }
    let request = web.request(reqwest::Method::GET, "/sessions/s/artifacts").header("accept-encoding", "gzip");
    let answer = request.send().await.unwrap();
    assert_eq!(answer.headers()["content-encoding"], "gzip");
    let (compressed, plain) = (answer.bytes().await.unwrap(), web.artifacts("s").await);
    assert_eq!(plain.len(), 50);
    assert!(compressed.len() < 4000 && compressed.starts_with(&[0x1f, 0x8b]), "{} bytes", compressed.len());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_command_stream_takes_over() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let web = Web::new(server.addresses().http);
    web.make("s").await;
    let mut all = web.open("/sessions/stream").await;
    all.expect("session_snapshot").await;
    all.expect("session_snapshot_end").await;
    let mut heard = Vec::new();
    let mut current = web.open("/sessions/s/commands").await;
    all.expect("session_updated").await;
    let mut sent = 0;
    for round in 0..20 {
        for _ in 0..3 {
            assert_eq!(web.prompt("s", &sent.to_string()).await, 202);
            sent += 1;
        }
        // Some of them are read, some are still on their way.
        for _ in 0..round % 4 {
            heard.push(current.command().await);
        }
        let last = heard.last().map(|(id, _)| id.clone());
        let next = web.open_after("/sessions/s/commands", last.as_deref()).await;
        let mut old = std::mem::replace(&mut current, next);
        while let Some(command) = old.next().await.filter(|event| event.name != "replaced") {
            // Who says nothing of what it had, has what was sent to it.
            if last.is_none() {
                heard.push((command.id, command.data["text"].as_str().unwrap().to_owned()));
            }
        }
        assert_eq!(web.status("s").await, "live", "the end of the old one is not the end");
    }
    while heard.len() < sent {
        heard.push(current.command().await);
    }
    let texts: Vec<_> = heard.iter().map(|(_, text)| text.clone()).collect();
    assert_eq!(texts, (0..sent).map(|n| n.to_string()).collect::<Vec<_>>(), "each once, in order");
    // Without a word on what it had, a stream goes on behind what was taken.
    let mut silent = web.open("/sessions/s/commands").await;
    current.expect("replaced").await;
    current.ends().await;
    assert_eq!(web.prompt("s", "new").await, 202);
    assert_eq!(silent.command().await.1, "new");
    drop(silent);
    assert_eq!(
        all.expect("session_updated").await.data["fields"],
        json!({"status": "disconnected"}),
        "and nothing between"
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_streams_fit_one_connection_of_http_2() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let mut web = Web::new(server.addresses().http);
    web.client = reqwest::Client::builder().http2_prior_knowledge().build().unwrap();
    web.make("s").await;
    let mut streams = Vec::new();
    for _ in 0..50 {
        streams.push(web.open("/sessions/s/stream").await);
    }
    web.tell("s", json!({"type": "user_prompt", "text": "hello"})).await;
    for stream in &mut streams {
        assert_eq!(stream.expect("artifact_created").await.data["artifact"]["text"], "hello");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_history_is_there_whoever_looked_before() {
    let dir = tempfile::tempdir().unwrap();
    let server_one = server(dir.path()).await;
    let web = Web::new(server_one.addresses().http);
    web.make("s").await;
    // Past several checkpoints, and nobody looks.
    for batch in 0..20 {
        let events: Vec<Value> = (0..500)
            .map(|n| match n % 5 {
                0 => json!({"type": "user_prompt", "text": format!("{batch} {n}")}),
                _ => json!({"type": "text_delta", "delta": format!("{n} ")}),
            })
            .collect();
        web.tell("s", events.into()).await;
    }
    let before = web.artifacts("s").await;
    assert_eq!(before.len(), 20 * 200);
    server_one.stop().await;
    let server_two = server(dir.path()).await;
    let web = Web::new(server_two.addresses().http);
    assert_eq!(web.artifacts("s").await, before);
    web.tell("s", json!({"type": "text_delta", "delta": "more"})).await;
    let after = web.artifacts("s").await;
    assert!(after.last().unwrap()["text"].as_str().unwrap().ends_with("499 more"), "the open text goes on");
    assert_eq!(after[..after.len() - 1], before[..before.len() - 1]);
    server_two.stop().await;
}
