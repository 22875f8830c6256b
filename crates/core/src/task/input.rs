//! Tasks that wait for a message: one that was delivered to their worker and is what they wait for lets them go on.

use bytes::Bytes;
use serde_json::Value;

use super::{
    Desk, Tasks, Wait,
    attend::lock,
    decide::Request,
    operate::{Changed, step},
    sql,
    state::State,
};
use crate::{error::Error, identity::SEPARATOR};

impl Desk {
    /// A message went to the worker. If something of the worker's waits for it, that goes on.
    pub fn heard(&self, source: &str, payload: &Bytes) {
        if lock(&self.mailbox.inside).inputs == 0 {
            return;
        }
        let (tasks, identity, source, payload) =
            (self.tasks.clone(), self.identity.clone(), source.to_owned(), payload.clone());
        self.tasks.spawn(async move {
            if let Err(error) = tasks.input(&identity, &source, &payload).await {
                tracing::warn!(%error, identity, "a message that something may wait for was not looked at");
            }
        });
    }
}

impl Tasks {
    async fn input(&self, identity: &str, source: &str, payload: &[u8]) -> Result<(), Error> {
        let (name, source, body) =
            (identity.to_owned(), source.to_owned(), serde_json::from_slice::<Value>(payload).unwrap_or_default());
        let (context, times) = (self.context(true), self.0.times);
        let resumed = self.write(move |tx| {
            let (name, source, body) = (name.clone(), source.clone(), body.clone());
            Box::pin(async move {
                let mut resumed: Vec<Changed> = Vec::new();
                for task in sql::awaiting_input(tx.as_read(), &name).await? {
                    if task.wait.as_ref().is_some_and(|wait| is_it(wait, &source, &body)) {
                        resumed.push(step(tx, &task, &Request::Resume, context, &times).await?);
                    }
                }
                Ok(resumed)
            })
        });
        for changed in resumed.await? {
            self.settle(changed).await;
        }
        Ok(())
    }

    /// Keeps count of what waits for a message, for each worker.
    pub(super) fn count_inputs(&self, changed: &Changed) {
        let was = changed.before.state == State::WaitingInput;
        let is = changed.after.state == State::WaitingInput;
        if was == is {
            return;
        }
        let of = if is { &changed.after.assignee } else { &changed.before.assignee };
        if let Some(mailbox) = self.floor().mailboxes.get(of) {
            let mut inside = lock(&mailbox.inside);
            inside.inputs = if is { inside.inputs + 1 } else { inside.inputs.saturating_sub(1) };
        }
    }
}

/// Whether a message is what is waited for. A wait that names neither a sender nor a content is ended by somebody who says
/// so, and not by whatever comes.
fn is_it(wait: &Wait, source: &str, body: &Value) -> bool {
    let expected = wait.expected_principal.as_str();
    if expected.is_empty() && wait.input_match.is_empty() {
        return false;
    }
    let window = source.strip_prefix(expected).is_some_and(|rest| rest.starts_with(SEPARATOR));
    let is_from = expected.is_empty() || expected == source || expected.starts_with("us::") && window;
    let says = |(key, wanted): (&String, &String)| match body.get(key) {
        Some(Value::String(text)) => text == wanted,
        Some(other) => serde_json::to_string(other).is_ok_and(|text| text == *wanted),
        None => false,
    };
    is_from && wait.input_match.iter().all(says)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Wait, is_it};
    use crate::task::WaitReason;

    fn check(expected: &str, pairs: &[(&str, &str)], source: &str, body: &serde_json::Value) -> bool {
        let wait = Wait {
            reason: WaitReason::Input,
            expected_principal: expected.into(),
            input_match: pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            authority_request: String::new(),
            depends_on: Vec::new(),
            wake_on_any: false,
            timeout_ms: 0,
            wake_at_ms: 0,
            hibernation: None,
        };
        is_it(&wait, source, body)
    }

    #[test]
    fn a_message_fits_by_sender_and_content() {
        let body = json!({"thread": "7", "n": 3, "ok": true});
        assert!(!check("", &[], "us::ann::w", &body), "nothing was named");
        assert!(check("us::ann", &[], "us::ann::w", &body));
        assert!(check("us::ann::w", &[], "us::ann::w", &body));
        assert!(!check("us::an", &[], "us::ann::w", &body));
        assert!(!check("ag::w::i", &[], "ag::w::i::s", &body), "only users have windows");
        assert!(check("", &[("thread", "7"), ("n", "3"), ("ok", "true")], "ag::w::i::s", &body));
        assert!(!check("us::ann", &[("thread", "8")], "us::ann::w", &body));
        assert!(!check("", &[("thread", "7")], "us::ann::w", &json!("text")));
    }
}
