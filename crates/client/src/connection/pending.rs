//! Requests that wait for their replies. No I/O here.

use std::collections::{BTreeMap, HashMap, VecDeque};

use tokio::sync::oneshot;
use trunkline_proto::v1::{
    DownstreamMessage, ErrorResponse, downstream_message::Payload as Down, upstream_message::Payload as Up,
};

use crate::error::{Error, Kind, Result};

/// Replies that a published server sends without the id of their request, but in the requests' order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Ordered {
    Workspace,
    Agent,
    Rules,
    Token,
}

/// What waits.
#[derive(Default)]
pub(crate) struct Pending {
    next: u64,
    entries: BTreeMap<u64, Entry>,
    ordered: HashMap<Ordered, VecDeque<u64>>,
}

struct Entry {
    /// Gone if nobody waits any more; then a reply is only taken out of its order.
    reply: Option<oneshot::Sender<Result<Down>>>,
    ordered: Option<Ordered>,
    /// The request, if it can be made again.
    again: Option<Up>,
    is_sent: bool,
    /// A refusal without a reason, which comes right behind.
    refusal: Option<Down>,
}

/// Entries that nobody waits for and that are kept for their place in the order, at most.
const ABANDONED_MAX: usize = 1024;

impl Pending {
    /// Whether somebody waits for an answer.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// A new request's number; `build` makes it with its id.
    pub(crate) fn register(
        &mut self,
        ordered: Option<Ordered>,
        idempotent: bool,
        build: impl FnOnce(u64) -> Up,
    ) -> (u64, Up, oneshot::Receiver<Result<Down>>) {
        self.next += 1;
        let number = self.next;
        let up = build(number);
        let (reply, answer) = oneshot::channel();
        let again = idempotent.then(|| up.clone());
        let entry = Entry { reply: Some(reply), ordered, again, is_sent: false, refusal: None };
        self.entries.insert(number, entry);
        (number, up, answer)
    }

    /// It goes out now. False if nobody wants it any more: then it does not.
    pub(crate) fn sent(&mut self, number: u64) -> bool {
        let Some(entry) = self.entries.get_mut(&number) else { return false };
        entry.is_sent = true;
        if let Some(ordered) = entry.ordered {
            self.ordered.entry(ordered).or_default().push_back(number);
        }
        true
    }

    /// Its asker does not wait any more.
    pub(crate) fn forget(&mut self, number: u64) {
        let Some(entry) = self.entries.get_mut(&number) else { return };
        if !entry.is_sent || entry.ordered.is_none() {
            self.entries.remove(&number);
            return;
        }
        (entry.reply, entry.again) = (None, None);
        let abandoned = self.entries.iter().filter(|(_, entry)| entry.reply.is_none());
        if abandoned.clone().count() > ABANDONED_MAX
            && let Some(oldest) = abandoned.map(|(number, _)| *number).next()
        {
            self.take(oldest);
        }
    }

    /// A reply came. Gives it back if nobody asked for it.
    pub(crate) fn reply(&mut self, number: Option<u64>, ordered: Option<Ordered>, down: Down) -> Option<Down> {
        let number = number.or_else(|| self.ordered.get(&ordered?)?.front().copied());
        let Some(number) = number else { return Some(down) };
        if is_refusal_without_reason(&down) {
            let Some(entry) = self.entries.get_mut(&number) else { return Some(down) };
            entry.refusal = Some(down);
            return None;
        }
        match self.take(number) {
            Some(Entry { reply: Some(reply), .. }) => {
                let _ = reply.send(Ok(down));
                None
            }
            // It came too late.
            Some(_) => None,
            None => Some(down),
        }
    }

    /// A refusal came. False if it is nobody's here. With `by_order`, one without an id is the oldest's.
    pub(crate) fn refused(&mut self, number: Option<u64>, error: &ErrorResponse, by_order: bool) -> bool {
        let number = number.or_else(|| by_order.then(|| self.oldest_ordered(error)).flatten());
        let Some(entry) = number.and_then(|number| self.take(number)) else { return false };
        if let Some(reply) = entry.reply {
            let _ = reply.send(Err(Error::from_response(error)));
        }
        true
    }

    /// A published server refuses workspaces, agents and rules without saying whose request it was.
    fn oldest_ordered(&self, error: &ErrorResponse) -> Option<u64> {
        let is_denied = error.request_id.is_empty() && error.code.contains("PERMISSION_DENIED");
        is_denied.then(|| self.ordered.values().filter_map(VecDeque::front).min().copied()).flatten()
    }

    fn take(&mut self, number: u64) -> Option<Entry> {
        let entry = self.entries.remove(&number)?;
        if let Some(order) = entry.ordered.and_then(|ordered| self.ordered.get_mut(&ordered)) {
            order.retain(|waiting| *waiting != number);
        }
        Some(entry)
    }

    /// The connection broke. What went out and can be made again is given back, in order; the rest of it has failed.
    pub(crate) fn broken(&mut self, why: &Error) -> Vec<(u64, Up)> {
        self.ordered.clear();
        let mut again = Vec::new();
        let sent: Vec<u64> =
            self.entries.iter().filter(|(_, entry)| entry.is_sent).map(|(number, _)| *number).collect();
        for number in sent {
            let Some(mut entry) = self.entries.remove(&number) else { continue };
            let Some(reply) = entry.reply.take().filter(|reply| !reply.is_closed()) else { continue };
            if let Some(up) = entry.again.clone() {
                again.push((number, up));
                self.entries.insert(number, Entry { reply: Some(reply), is_sent: false, refusal: None, ..entry });
            } else {
                let message = format!("the connection broke before the answer came: {why}");
                let _ = reply.send(Err(Error::new(Kind::Interrupted, message).with_source(why.clone())));
            }
        }
        again
    }

    /// The end: nobody is answered any more.
    pub(crate) fn fail(&mut self, why: &Error) {
        self.ordered.clear();
        for (_, entry) in std::mem::take(&mut self.entries) {
            if let Some(reply) = entry.reply {
                let _ = reply.send(Err(why.clone()));
            }
        }
    }

    /// What is known of a request whose time is up.
    pub(crate) fn refusal(&self, number: u64) -> Option<Error> {
        self.entries.get(&number)?.refusal.as_ref().map(|_| Error::from_words(""))
    }
}

/// Of keys, a refusal is told twice, and only the second one says why.
fn is_refusal_without_reason(down: &Down) -> bool {
    matches!(down, Down::Kv(reply) if !reply.success)
}

/// The id of the request that a frame answers, and where it stands if it has none.
pub(crate) fn asked(frame: &DownstreamMessage) -> Option<(&str, Option<Ordered>)> {
    Some(match frame.payload.as_ref()? {
        Down::Kv(reply) => (&reply.request_id, None),
        Down::Checkpoint(reply) => (&reply.request_id, None),
        Down::Admin(reply) => (&reply.request_id, None),
        Down::SessionResponse(reply) => (&reply.request_id, None),
        Down::TaskQuery(reply) => (&reply.request_id, None),
        Down::TaskOp(reply) => (&reply.request_id, None),
        Down::Workspace(reply) => (&reply.request_id, Some(Ordered::Workspace)),
        Down::Agent(reply) => (&reply.request_id, Some(Ordered::Agent)),
        Down::Acl(reply) => (&reply.request_id, Some(Ordered::Rules)),
        Down::WorkflowResponse(reply) => (&reply.request_id, None),
        Down::Token(reply) => (&reply.request_id, Some(Ordered::Token)),
        Down::AuditResponse(reply) => (&reply.request_id, None),
        Down::AuthorityGrant(reply) => (&reply.request_id, None),
        Down::CreateTask(reply) => (&reply.request_id, None),
        Down::ResolveAuthorityResponse(reply) => (&reply.request_id, None),
        Down::ConnectionStatusResponse(reply) => (&reply.request_id, None),
        Down::SubmitAuditEventResponse(reply) => (&reply.client_request_id, None),
        Down::AuthorityRequestResponse(reply) => (&reply.client_request_id, None),
        Down::TaskSubscriptionResponse(reply) => (&reply.client_request_id, None),
        Down::AccessCheckResponse(reply) => (&reply.request_id, None),
        Down::BatchAccessCheckResponse(reply) => (&reply.request_id, None),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use trunkline_proto::v1::{KvOperation, KvResponse, WorkspaceOperation, WorkspaceResponse};

    use super::*;

    fn up() -> Up {
        Up::WorkspaceOp(WorkspaceOperation::default().into())
    }

    fn workspace(message: &str) -> Down {
        Down::Workspace(WorkspaceResponse { message: message.into(), ..WorkspaceResponse::default() }.into())
    }

    fn denied() -> ErrorResponse {
        ErrorResponse { code: "ERR_PERMISSION_DENIED".into(), ..ErrorResponse::default() }
    }

    fn said(answer: &mut oneshot::Receiver<Result<Down>>) -> String {
        match answer.try_recv().unwrap() {
            Ok(Down::Workspace(reply)) => reply.message,
            Ok(other) => format!("{other:?}"),
            Err(error) => format!("{:?}", error.kind()),
        }
    }

    #[test]
    fn replies_without_an_id_go_to_the_oldest_of_their_kind_also_if_it_has_gone() {
        let mut pending = Pending::default();
        let [mut a, mut b, mut c] = [(); 3].map(|()| pending.register(Some(Ordered::Workspace), false, |_| up()));
        for number in [a.0, b.0, c.0] {
            assert!(pending.sent(number));
        }
        pending.forget(b.0);
        assert!(pending.reply(None, Some(Ordered::Workspace), workspace("a")).is_none());
        assert!(pending.reply(None, Some(Ordered::Workspace), workspace("b")).is_none());
        assert!(pending.refused(None, &denied(), true));
        assert_eq!((said(&mut a.2), said(&mut c.2)), ("a".into(), "Denied".into()));
        assert!(b.2.try_recv().is_err());
        assert!(!pending.refused(None, &denied(), true));
        assert!(pending.is_empty());
    }

    #[test]
    fn what_nobody_wants_any_more_does_not_go_out() {
        let mut pending = Pending::default();
        let (number, ..) = pending.register(None, true, |_| up());
        pending.forget(number);
        assert!(!pending.sent(number));
    }

    #[test]
    fn a_break_fails_what_went_out_unless_it_can_be_made_again() {
        let mut pending = Pending::default();
        let mut once = pending.register(Some(Ordered::Workspace), false, |_| up());
        let mut again = pending.register(Some(Ordered::Workspace), true, |_| up());
        let mut queued = pending.register(None, false, |_| up());
        assert!(pending.sent(once.0) && pending.sent(again.0));
        let why = Error::new(Kind::Unavailable, "reset");
        let replayed: Vec<u64> = pending.broken(&why).into_iter().map(|(number, _)| number).collect();
        assert_eq!(replayed, [again.0]);
        assert_eq!(said(&mut once.2), "Interrupted");
        assert!(again.2.try_recv().is_err() && queued.2.try_recv().is_err());
        assert!(pending.sent(again.0));
        pending.reply(None, Some(Ordered::Workspace), workspace("second time"));
        assert_eq!(said(&mut again.2), "second time");
        pending.fail(&Error::new(Kind::Closed, "closed"));
        assert_eq!(said(&mut queued.2), "Closed");
    }

    #[test]
    fn a_refused_key_is_told_with_its_reason() {
        let mut pending = Pending::default();
        let mut kv = pending.register(None, true, |_| Up::KvOp(KvOperation::default().into()));
        pending.sent(kv.0);
        assert!(pending.reply(Some(kv.0), None, Down::Kv(KvResponse::default().into())).is_none());
        assert!(kv.2.try_recv().is_err());
        assert!(pending.refusal(kv.0).is_some());
        assert!(pending.refused(Some(kv.0), &denied(), false));
        assert_eq!(said(&mut kv.2), "Denied");
    }
}
