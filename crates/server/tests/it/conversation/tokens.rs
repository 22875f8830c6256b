//! Who is let in, and from which pages.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use trunkline_core::conversation::Options;

use super::{AGENT, KEY, ORIGIN, OTHER_AGENT, SECRET, begin, claims, hs256, now, server, server_with, sign};
use crate::sandbox::Web;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_good_tokens_are_let_in() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let web = Web::new(server.addresses().http);
    let with = |change: &dyn Fn(&mut Value)| {
        let mut claims = claims("ann", AGENT);
        change(&mut claims);
        sign(&hs256(), &claims, SECRET)
    };
    let (status, refused) = web.get("/api/v2/agent_convos").await;
    assert_eq!((status, &refused["error"]["code"]), (401, &json!("unauthenticated")));
    let good = [
        with(&|_| {}),
        with(&|claims| claims["exp"] = json!(now() - 20)),
        with(&|claims| drop(claims.as_object_mut().unwrap().remove("iat"))),
        with(&|claims| claims["aud"] = json!(["other", "valet-sdk"])),
        sign(&hs256(), &claims("ann", AGENT), &"f".repeat(32)),
        sign(&hs256(), &claims("auth0|a:1", OTHER_AGENT), SECRET),
    ];
    for token in good {
        assert_eq!(web.with(&token).get("/api/v2/agent_convos").await.0, 200, "{token}");
    }
    let nobody = web.with("x").get("/api/v2/agent_convos").await;
    assert_eq!(nobody.0, 401);
    let none = format!("{}.", sign(&json!({"alg": "none"}), &claims("ann", AGENT), SECRET).rsplit_once('.').unwrap().0);
    let bad = [
        ("no app", with(&|claims| (claims["iss"], claims["company_api_key"]) = (json!("x"), json!("x")))),
        ("another issuer", with(&|claims| claims["iss"] = json!("x"))),
        ("another's audience", with(&|claims| claims["aud"] = json!("x"))),
        ("no end", with(&|claims| drop(claims.as_object_mut().unwrap().remove("exp")))),
        ("too long", with(&|claims| claims["exp"] = json!(now() + 25 * 3600))),
        (
            "too long, from tomorrow",
            with(&|claims| (claims["iat"], claims["exp"]) = (json!(now() + 90_000), json!(now() + 91_000))),
        ),
        ("another secret", sign(&hs256(), &claims("ann", AGENT), &"x".repeat(32))),
        ("another app's secret", sign(&hs256(), &claims("ann", AGENT), &"o".repeat(32))),
        ("another way to sign", sign(&json!({"alg": "HS512"}), &claims("ann", AGENT), SECRET)),
        ("not signed", none),
        ("very long", "x".repeat(5000)),
    ];
    for (what, token) in &bad {
        // All alike, so that nobody learns which apps there are.
        assert_eq!(web.with(token).get("/api/v2/agent_convos").await, nobody, "{what}");
    }
    let (status, refused) =
        web.with(&with(&|claims| claims["exp"] = json!(now() - 60))).get("/api/v2/agent_convos").await;
    assert_eq!((status, &refused["error"]["code"]), (401, &json!("token_expired")));
    for user in ["", "ann@example.org", &"x".repeat(129), "a b", "a::b"] {
        let token = with(&|claims| claims["source_key"] = json!(user));
        let (status, refused) = web.with(&token).post("/api/v2/sessions", "").await;
        assert_eq!((status, &refused["error"]["code"]), (401, &json!("source_key")), "{user}");
        assert!(refused["error"]["message"].as_str().unwrap().starts_with("source_key "));
    }
    for agent in ["x", "33333333-3333-4333-8333-333333333333"] {
        let token = with(&|claims| claims["agent_uuid"] = json!(agent));
        assert_eq!(web.with(&token).post("/api/v2/sessions", "").await.0, 403);
    }
    // An administrator's key, or none where that is enough, opens nothing here.
    assert_eq!(web.get("/sessions").await.0, 200);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_pages_of_the_app_may_ask() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let web = Web::new(server.addresses().http);
    let token = sign(&hs256(), &claims("ann", AGENT), SECRET);
    let other = "https://other.example.org";
    let own = format!("http://{}", server.addresses().http);
    let allowed = |response: &reqwest::Response| {
        let origin = response.headers().get("access-control-allow-origin");
        origin.map(|origin| origin.to_str().unwrap().to_owned())
    };
    for (origin, expected) in [(ORIGIN, 204), (other, 204), ("https://evil.example.org", 403), ("null", 403)] {
        let ask = web.request(Method::OPTIONS, "/api/v2/sessions").header("origin", origin);
        let response = ask.header("access-control-request-method", "POST").send().await.unwrap();
        assert_eq!(response.status(), expected, "{origin}");
        assert_eq!(allowed(&response), (expected == 204).then(|| origin.to_owned()));
        if expected == 204 {
            let headers = response.headers()["access-control-allow-headers"].to_str().unwrap();
            for name in ["authorization", "content-type", "accept", "idempotency-key", "last-event-id"] {
                assert!(headers.contains(name), "{name}");
            }
        }
    }
    let ask = async |origin: &str, token: Option<&str>| {
        let request = web.request(Method::GET, "/api/v2/agent_convos").header("origin", origin);
        let request = token.into_iter().fold(request, reqwest::RequestBuilder::bearer_auth);
        let response = request.send().await.unwrap();
        assert!(response.headers().get_all("vary").iter().any(|vary| vary == "origin"));
        (response.status(), allowed(&response))
    };
    assert_eq!(ask(ORIGIN, Some(&token)).await, (StatusCode::OK, Some(ORIGIN.to_owned())));
    assert_eq!(ask(&own, Some(&token)).await, (StatusCode::OK, None));
    // Of another app: also with a token that a page should not have.
    assert_eq!(ask(other, Some(&token)).await, (StatusCode::FORBIDDEN, None));
    assert_eq!(ask("https://evil.example.org", Some(&token)).await, (StatusCode::FORBIDDEN, None));
    assert_eq!(ask("https://evil.example.org", None).await, (StatusCode::FORBIDDEN, None));
    // A page hears that its token is not good.
    let mut expired = claims("ann", AGENT);
    expired["exp"] = json!(now() - 60);
    let expired = sign(&hs256(), &expired, SECRET);
    assert_eq!(ask(ORIGIN, Some(&expired)).await, (StatusCode::UNAUTHORIZED, Some(ORIGIN.to_owned())));
    assert_eq!(ask(other, Some(&expired)).await, (StatusCode::FORBIDDEN, None));
    // Whoever signs with anything learns of no app.
    for key in [KEY, "app_other", "app_nothing"] {
        let mut claims = claims("ann", AGENT);
        (claims["iss"], claims["company_api_key"]) = (json!(key), json!(key));
        let forged = sign(&hs256(), &claims, &"x".repeat(32));
        assert_eq!(ask(other, Some(&forged)).await, (StatusCode::UNAUTHORIZED, Some(other.to_owned())), "{key}");
    }
    assert_eq!(ask(ORIGIN, Some("x")).await, (StatusCode::UNAUTHORIZED, Some(ORIGIN.to_owned())));
    let retry = web.request(Method::GET, "/api/v2/nothing").header("origin", ORIGIN).send().await.unwrap();
    assert_eq!((retry.status(), allowed(&retry)), (StatusCode::NOT_FOUND, Some(ORIGIN.to_owned())));
    assert_eq!(retry.headers()["access-control-expose-headers"], "retry-after");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_method_that_a_path_does_not_take_is_refused_with_those_that_it_does() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let (web, ops) = (Web::new(server.addresses().http), Web::new(server.addresses().ops));
    let ann = web.with(&sign(&hs256(), &claims("ann", AGENT), SECRET));
    for (web, path, allow) in [
        (&ann, "/api/v2/sessions", "POST"),
        (&ann, "/api/v2/agent_convos", "GET,HEAD"),
        (&ann, "/api/v2/files/x", "GET,HEAD"),
        (&web, "/sessions", "GET,HEAD"),
        (&web, "/sessions/a/events", "POST"),
        (&web, "/agent-socket", "GET,HEAD"),
        (&ops, "/metrics", "GET,HEAD"),
    ] {
        let refused = web.request(Method::PATCH, path).send().await.unwrap();
        assert_eq!((refused.status().as_u16(), refused.headers()["allow"].to_str().unwrap()), (405, allow), "{path}");
        let refused: Value = refused.json().await.unwrap();
        assert_eq!(refused["error"]["code"], "method_not_allowed", "{path}: {refused}");
    }
    for (web, path, allow) in [
        (&ann, "/api/v2/agent_convos/x/events", "GET"),
        (&web, "/sessions/stream", "GET"),
        (&web, "/sessions/a/commands", "GET, POST"),
    ] {
        let refused = web.request(Method::HEAD, path).send().await.unwrap();
        assert_eq!((refused.status().as_u16(), refused.headers()["allow"].to_str().unwrap()), (405, allow), "{path}");
    }
    let (status, refused) = web.get("/agent-socket").await;
    assert_eq!((status, &refused["error"]["code"]), (400, &json!("invalid_argument")), "{refused}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_that_a_proxy_shows_at_the_public_address_are_our_own() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { public_url: "https://chat.example.org/talk".into(), ..Options::default() };
    let server = server_with(dir.path(), options).await;
    let web = Web::new(server.addresses().http);
    let ann = web.with(&sign(&hs256(), &claims("ann", AGENT), SECRET));
    let ask = async |web: &Web, path: &str, origin: &str| {
        web.ask(web.request(Method::POST, path).header("origin", origin)).await
    };
    for origin in ["https://chat.example.org", &format!("http://{}", server.addresses().http)] {
        assert_eq!(ask(&ann, "/api/v2/sessions", origin).await.0, 200, "{origin}");
        assert!(matches!(ask(&web, "/sessions/one", origin).await.0, 200 | 201), "{origin}");
    }
    let (status, refused) = ask(&web, "/sessions/one", "https://evil.example.org").await;
    let message = refused["error"]["message"].as_str().unwrap();
    let host = server.addresses().http.to_string();
    for named in ["https://evil.example.org", &host, "http.allowed_origins", "conversation.public_url"] {
        assert!(status == 403 && message.contains(named), "{named}: {message}");
    }
    assert_eq!(ask(&ann, "/api/v2/sessions", "https://evil.example.org").await.0, 403);
    server.stop().await;
}

/// What a path or a query has that is no text is refused as anything that is not there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_text_is_refused_in_the_documented_form() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let web = Web::new(server.addresses().http);
    let ann = web.with(&sign(&hs256(), &claims("ann", AGENT), SECRET));
    for (web, path, expected) in [
        (&ann, "/api/v2/agent_convos/%ff", 404),
        (&ann, "/api/v2/agent_convos/%ff/events", 404),
        (&ann, "/api/v2/files/%ff", 404),
        (&web, "/api/v2/files/x?expires=soon&signature=%ff", 401),
        (&web, "/sessions/%ff", 404),
        (&web, "/sessions/%ff/artifacts", 404),
    ] {
        let (status, refused) = web.get(path).await;
        assert_eq!((status, refused["error"]["message"].is_string()), (expected, true), "{path}: {refused}");
    }
    // Nor is a list of what an object has.
    let convo = begin(&ann).await;
    assert_eq!(web.post("/sessions/new", "").await.0, 201);
    for (web, path, body) in [
        (&ann, format!("/api/v2/agent_convos/{convo}/stream_message"), r#"["hello"]"#),
        (&web, "/sessions/listed".to_owned(), r#"["project"]"#),
        (&web, "/sessions/new/events".to_owned(), r#"[["text_delta", "hello"]]"#),
    ] {
        let (status, refused) = web.post(&path, body).await;
        assert_eq!((status, refused["error"]["message"].is_string()), (400, true), "{path}: {refused}");
    }
    server.stop().await;
}
