//! Tasks that wait for a message: one that was delivered to their worker and is what they wait for lets them go on.

use bytes::Bytes;
use serde_json::Value;
use uuid::Uuid;

use super::{
    Desk, Tasks, Wait,
    decide::Request,
    mailbox::lock,
    operate::{Changed, step},
    sql,
    state::State,
};
use crate::{error::Error, identity::SEPARATOR};

impl Desk {
    /// A message went to the worker. What of the worker's waits for it goes on. Each wait asks for that once, however many
    /// messages fit.
    pub fn heard(&self, source: &str, payload: &Bytes) {
        let fitting: Vec<Uuid> = {
            let mut inside = lock(&self.mailbox.inside);
            if inside.inputs.is_empty() {
                return;
            }
            let mut body = None;
            let fits = |_: &Uuid, wait: &mut Wait| {
                let read = || serde_json::from_slice(payload).unwrap_or_default();
                is_from(wait, source) && says(wait, body.get_or_insert_with(read))
            };
            inside.inputs.extract_if(fits).map(|(task, _)| task).collect()
        };
        for task in fitting {
            let (tasks, identity) = (self.tasks.clone(), self.identity.clone());
            self.tasks.spawn_job(async move {
                if let Err(error) = tasks.input(&identity, task).await {
                    tracing::warn!(%error, identity, %task, "what it waited for has come, and it does not go on");
                }
            });
        }
    }
}

impl Tasks {
    async fn input(&self, identity: &str, task: Uuid) -> Result<(), Error> {
        let (name, context, times) = (identity.to_owned(), self.context(true), self.0.times);
        let resumed = self.write(move |tx| {
            let name = name.clone();
            Box::pin(async move {
                let found = sql::get(tx.as_read(), task).await?;
                let found = found.filter(|task| task.state == State::WaitingInput && task.assignee == name);
                let Some(task) = found else { return Ok(None) };
                step(tx, &task, &Request::Resume, context, &times).await.map(Some)
            })
        });
        if let Some(changed) = resumed.await? {
            self.settle(changed).await;
        }
        Ok(())
    }

    /// Keeps what waits for a message where the worker's messages go by.
    pub(super) fn note_inputs(&self, changed: &Changed) {
        let (before, after) = (&changed.before, &changed.after);
        if before.state != State::WaitingInput && after.state != State::WaitingInput {
            return;
        }
        // Who waits has the worker that it had before.
        if let Some(mailbox) = self.floor().mailboxes.get(&before.assignee) {
            let mut inside = lock(&mailbox.inside);
            match &after.wait {
                Some(wait) if after.state == State::WaitingInput => drop(inside.inputs.insert(after.id, wait.clone())),
                _ => drop(inside.inputs.remove(&after.id)),
            }
        }
    }
}

/// Whether a message comes from whom it is awaited. A wait that names neither a sender nor a content is ended by somebody
/// who says so, and not by whatever comes.
fn is_from(wait: &Wait, source: &str) -> bool {
    let expected = wait.expected_principal.as_str();
    if expected.is_empty() {
        return !wait.input_match.is_empty();
    }
    let window = source.strip_prefix(expected).is_some_and(|rest| rest.starts_with(SEPARATOR));
    expected == source || expected.starts_with("us::") && window
}

/// Whether a message says what is awaited.
fn says(wait: &Wait, body: &Value) -> bool {
    wait.input_match.iter().all(|(key, wanted)| match body.get(key) {
        Some(Value::String(text)) => text == wanted,
        Some(other) => serde_json::to_string(other).is_ok_and(|text| text == *wanted),
        None => false,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Wait, is_from, says};
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
        is_from(&wait, source) && says(&wait, body)
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
