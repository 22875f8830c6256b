//! Who may do what. Deny by default.
//!
//! Sending, by kind of sender and target (the published matrix, for the targets that are served):
//!
//! | sender | may send to | workspaces without a rule |
//! | --- | --- | --- |
//! | agent, task | all but `uu` | any |
//! | user | all but `uu` | any |
//! | service, bridge, workflow engine | all | none |
//! | orchestrator | `ag` `tu` `ta` `tb` | none |
//! | metrics bridge | nothing | – |

use super::{Attend, AttendPermit, Intent, Keep, KeepPermit, Send, SendPermit};
use crate::{
    caller::Caller,
    error::{Error, Kind},
    identity::Identity,
    topic::Target,
};

impl Intent for Send<'_> {
    type Permit = SendPermit;

    fn decide(self, caller: &Caller) -> Result<SendPermit, Error> {
        let topic = self.0.topic()?;
        if may_send(&caller.identity, self.0) && may_reach(&caller.identity, self.0) {
            return Ok(SendPermit { topic });
        }
        let message = format!("not authorized to send to topic {topic}");
        Err(Error::new(Kind::Denied, "ERR_PERMISSION_DENIED", message))
    }
}

fn may_send(sender: &Identity, target: &Target) -> bool {
    let to_all_windows = matches!(target, Target::User { .. });
    match sender {
        Identity::Agent(_) | Identity::UniqueTask(_) | Identity::Task(_) | Identity::User { .. } => !to_all_windows,
        Identity::Service(_) | Identity::Bridge(_) | Identity::WorkflowEngine => true,
        Identity::Orchestrator(_) => {
            matches!(target, Target::Agent(_) | Target::UniqueTask(_) | Target::Task(_) | Target::AnyTask { .. })
        }
        Identity::MetricsBridge => false,
    }
}

/// Without rules, those who live in workspaces reach all of them and the others none.
fn may_reach(sender: &Identity, target: &Target) -> bool {
    let lives_in_workspaces =
        matches!(sender, Identity::Agent(_) | Identity::UniqueTask(_) | Identity::Task(_) | Identity::User { .. });
    lives_in_workspaces || target.workspace().is_none()
}

impl Intent for Attend {
    type Permit = AttendPermit;

    /// Whoever was admitted under an identity may hold it; admission is the surfaces' business.
    fn decide(self, caller: &Caller) -> Result<AttendPermit, Error> {
        Ok(AttendPermit { identity: caller.identity.clone() })
    }
}

impl Intent for Keep {
    type Permit = KeepPermit;

    fn decide(self, caller: &Caller) -> Result<KeepPermit, Error> {
        Ok(KeepPermit { owner: caller.identity.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::{Caller, Identity, Intent as _, Send, Target};

    #[test]
    fn the_matrix_holds() {
        let targets = [
            "ag::w::i::s",
            "tu::w::i::s",
            "ta::w::i::s",
            "tb::w::i",
            "ga::w",
            "gu::w",
            "us::u::w",
            "uw::u::w",
            "uu::u",
        ];
        let grid = [
            (Identity::agent("w", "i", "s"), "yyyyyyyy."),
            (Identity::unique_task("w", "i", "s"), "yyyyyyyy."),
            (Identity::task("w", "i"), "yyyyyyyy."),
            (Identity::user("u", "w"), "yyyyyyyy."),
            (Identity::service("i", "s"), "......y.y"),
            (Identity::bridge("i", "s"), "......y.y"),
            (Ok(Identity::WorkflowEngine), "......y.y"),
            (Identity::orchestrator("i", "s"), "........."),
            (Ok(Identity::MetricsBridge), "........."),
        ];
        for (identity, expected) in grid {
            let caller = Caller { identity: identity.unwrap(), session: "s".into() };
            let row: String = targets
                .iter()
                .map(|target| if Send(&Target::parse(target).unwrap()).decide(&caller).is_ok() { 'y' } else { '.' })
                .collect();
            assert_eq!(row, expected, "{}", caller.identity);
        }
    }
}
