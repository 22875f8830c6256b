//! What becomes of a connection that cannot be.

use std::time::Duration;

use trunkline_client::{
    Agent, Bridge, Credentials, DuplicateRetry, Error, Kind, Orchestrator, Outgoing, Service, UniqueTask, User, Worker,
    kv::{Keep, Scope},
    proto::NegotiatedExtension,
};

use crate::world_messaging::{WS, World, done, hears, place, say};

const URI: &str = "urn:conformance:nobody-has-it";

#[tokio::test]
async fn names_that_the_server_would_refuse_are_refused_for_every_field() {
    let world = World::begin().await;
    let long = "x".repeat(129);
    let bad = ["", "a::b", "a*", "a>b", "a b", "a\nb", "a\x00b", "a\x7fb", &long];
    for bad in bad {
        let refused: [(&str, Error); 11] = [
            ("agent workspace", world.refused(Agent::builder(bad, "i", "s")).await),
            ("agent implementation", world.refused(Agent::builder(WS, bad, "s")).await),
            ("agent specifier", world.refused(Agent::builder(WS, "i", bad)).await),
            ("task workspace", world.refused(UniqueTask::builder(bad, "i", "s")).await),
            ("task specifier", world.refused(UniqueTask::builder(WS, "i", bad)).await),
            ("worker implementation", world.refused(Worker::builder(WS, bad)).await),
            ("user id", world.refused(User::builder(bad, "w")).await),
            ("window id", world.refused(User::builder("u", bad)).await),
            ("orchestrator implementation", world.refused(Orchestrator::builder(bad).profile("p")).await),
            ("service specifier", world.refused(Service::builder("i", bad)).await),
            ("bridge implementation", world.refused(Bridge::builder(bad, "s")).await),
        ];
        for (field, error) in refused {
            assert_eq!(error.kind(), Kind::Invalid, "{field} {bad:?}: {error:?}");
            assert!(!error.is_retryable(), "{field} {bad:?}");
        }
    }
}

#[tokio::test]
async fn a_name_of_128_characters_is_accepted() {
    let world = World::begin().await;
    let agent = world.agent(&"x".repeat(128)).await;
    done(&agent).await;
}

#[tokio::test]
async fn an_extension_that_the_server_lacks_is_told_in_the_welcome() {
    let world = World::begin().await;
    let agent = world.connect(Agent::builder(WS, "worker", "a").extension(URI, "1", false)).await;
    let welcome = agent.welcome().unwrap();
    let told: Vec<&NegotiatedExtension> = welcome.extensions.iter().filter(|each| each.uri == URI).collect();
    assert_eq!(told.len(), 1);
    assert!(!told[0].supported);
    assert!(!welcome.supports(URI));
}

#[tokio::test]
async fn an_extension_that_is_required_and_lacking_fails_the_connection() {
    let world = World::begin().await;
    let error = world.refused(Agent::builder(WS, "worker", "a").extension(URI, "1", true)).await;
    assert_eq!(error.kind(), Kind::Precondition, "{error:?}");
    assert!(error.to_string().contains(URI), "{error}");

    // And leaves the identity to others.
    let patience = DuplicateRetry { attempts: 200, delay: Duration::from_millis(50) };
    let agent = world.connect(Agent::builder(WS, "worker", "a").retry_on_duplicate(patience)).await;
    done(&agent).await;
}

#[tokio::test]
async fn a_made_up_token_is_not_let_in() {
    let world = World::begin().await;
    let made_up = Credentials::task_token("not-a-token");
    let error = world.refused(Agent::builder(WS, "worker", "a").credentials(made_up)).await;
    assert_eq!(error.kind(), Kind::Unauthenticated, "{error:?}");
}

#[tokio::test]
async fn what_does_not_fit_into_a_frame_is_refused_and_breaks_nothing() {
    let world = World::begin().await;
    let agent = world.agent("a").await;
    let large = || vec![0; 5 * 1024 * 1024];
    let refused = [
        agent.send(Outgoing::new(place(&agent), large())).await,
        agent.try_send(Outgoing::new(place(&agent), large())),
        agent.send_confirmed(Outgoing::new(place(&agent), large())).await,
        agent.kv(Scope::GlobalExclusive).put("k", large()).await,
        agent.checkpoints().save("k", large(), Keep::Forever).await,
    ];
    for refused in refused {
        let error = refused.unwrap_err();
        assert_eq!((error.kind(), error.is_retryable()), (Kind::Invalid, false), "{error:?}");
    }
    say(&agent, place(&agent), "still fine").await;
    hears(&agent, "still fine").await;
    assert_eq!(agent.welcome().unwrap().reconnections, 0);
}

// Not ported:
// - A typed client cannot send what these send: test_first_frame_must_be_init, test_init_without_a_principal_is_invalid,
//   test_second_init_ends_the_stream, test_bytes_that_are_not_protobuf_end_the_stream, test_gateway_survives_garbage,
//   test_gateway_waits_quietly_for_init, test_goodbye_without_init_is_not_a_success,
//   test_unknown_method_is_unimplemented, test_frame_without_a_payload_does_not_end_the_stream,
//   test_admin_query_is_answered_with_not_implemented, test_oversized_frame_ends_the_stream.
// - test_invalid_identifier_is_refused, test_identifier_rules_hold_for_every_field: this library refuses such names before
//   anything is sent; that the server refuses them too is not seen here.
