//! Looking at tasks.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use trunkline_store::ledger::{ReadTx, TxFuture, Value};
use uuid::Uuid;

use super::{
    Task, Tasks, decide,
    operate::missing,
    sql,
    state::{State, Status},
};
use crate::{
    caller::Caller,
    error::{Error, Kind},
    gate::{Inspect, ListTasks, TouchTask},
    identity::Identity,
    limits::{COUNT_MAX, LIST_BYTES_MAX},
    token::digest,
};

/// Tasks on a page where no limit is named, and at most. The published figures.
const PAGE: i64 = 100;
const PAGE_MAX: i64 = 1000;

/// Tasks that are read at a time: one may have some 200 KiB, and a page ends where its bytes do.
const PIECE: i64 = 64;

/// Which tasks; empty texts, zeros and empty lists fit all.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Filter {
    /// Empty for the caller's own.
    pub workspace: String,
    /// See [`Task::kind`].
    pub kind: String,
    /// Any of these.
    pub statuses: Vec<Status>,
    /// None of these.
    pub except_statuses: Vec<Status>,
    /// Only those that failed for good and wait for somebody to look at them.
    pub dead_letters: bool,
    /// Children of this task.
    pub parent: String,
    /// And theirs.
    pub descendants: bool,
    /// See [`Task::root`].
    pub root: String,
    /// See [`Task::correlation`].
    pub correlation: String,
    /// See [`Task::context`].
    pub context: String,
    /// See [`Task::creator`].
    pub creator: String,
    /// See [`Task::subject`]; `*` for any but none.
    pub subject: String,
    /// See [`Task::class`].
    pub class: i32,
    /// None of these.
    pub except_classes: Vec<i32>,
    /// Exactly.
    pub priority: i64,
    /// Or more.
    pub min_priority: i64,
    /// Changed then or later, in Unix milliseconds.
    pub changed_after: i64,
    /// At most so many.
    pub limit: i64,
    /// Behind so many.
    pub offset: i64,
    /// Behind the page that this came with.
    pub page_token: String,
    /// Asked for what no task has.
    pub never: bool,
}

/// Tasks, the one that was changed last first.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// Some of them.
    pub tasks: Vec<Task>,
    /// How many fit in all, counted up to [`COUNT_MAX`].
    pub total: i64,
    /// With which the next page is asked for; empty if this is the last.
    pub next: String,
}

impl Tasks {
    /// One task.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if there is none or the caller may not know of it, [`Kind::Unavailable`].
    pub async fn get(&self, caller: &Caller, id: &str) -> Result<Task, Error> {
        let id = decide::id(id).ok_or_else(missing)?;
        let found = self.read(move |tx| Box::pin(async move { Ok(sql::get(tx, id).await?) })).await?;
        let task = found.ok_or_else(missing)?;
        self.0.gate.authorize(caller, TouchTask(&task)).map_err(|_| missing())?;
        Ok(task)
    }

    /// One task, for the server itself.
    pub(crate) async fn find(&self, id: Uuid) -> Result<Option<Task>, Error> {
        self.read(move |tx| Box::pin(async move { Ok(sql::get(tx, id).await?) })).await
    }

    /// What runs in a workspace for a user that takes part in it; nothing for anybody else.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn participating(&self, caller: &Caller, workspace: &str) -> Result<Vec<Task>, Error> {
        let Identity::User { user, .. } = &caller.identity else { return Ok(Vec::new()) };
        let (user, workspace) = (user.clone(), workspace.to_owned());
        let found = self.read(move |tx| {
            let (user, workspace) = (user.clone(), workspace.clone());
            Box::pin(async move { Ok(sql::running_for(tx, &user, &workspace).await?) })
        });
        Ok(found.await?.into_iter().filter(Task::has_participant).collect())
    }

    /// The tasks of a workspace that fit. Who lives in none, and does not administer tasks, sees what is its own. A page ends
    /// after [`LIST_BYTES_MAX`] even if more tasks were asked for; its token goes on behind it.
    ///
    /// # Errors
    /// [`Kind::Denied`], [`Kind::Invalid`] for a page token that is none, [`Kind::Unavailable`].
    pub async fn list(&self, caller: &Caller, home: Option<&str>, mut filter: Filter) -> Result<Page, Error> {
        if filter.workspace.is_empty() {
            home.unwrap_or_default().clone_into(&mut filter.workspace);
        }
        let party = if filter.workspace.is_empty() {
            let sees_all = self.0.gate.authorize(caller, Inspect("tasks")).is_ok();
            if sees_all { String::new() } else { caller.identity.to_string() }
        } else {
            self.0.gate.authorize(caller, ListTasks(&filter.workspace))?;
            String::new()
        };
        if filter.never {
            return Ok(Page::default());
        }
        filter.limit = if filter.limit <= 0 { PAGE } else { filter.limit.min(PAGE_MAX) };
        let before = page_token(&filter.page_token)?;
        let page = self.0.gate.scan_tasks(move |tx| {
            let (filter, party, before) = (filter.clone(), party.clone(), before.clone());
            select(tx, filter, party, before)
        });
        page.await
    }

    /// The task whose token this is, if it is good for `claimed`.
    ///
    /// # Errors
    /// [`Kind::Unauthenticated`] for a token that is none, [`Kind::Denied`] for one that is for somebody else.
    pub async fn authenticate(&self, secret: &str, claimed: &Identity) -> Result<Uuid, Error> {
        let (hash, now) = (digest(secret), self.now());
        let found = self.0.gate.glance(move |tx| sql::token(tx, hash.clone(), now)).await?;
        let unknown = "invalid or revoked token: unknown token";
        let unknown = || Error::new(Kind::Unauthenticated, "ERR_UNAUTHENTICATED", unknown);
        let (identity, task) = found.ok_or_else(unknown)?;
        if identity != claimed.to_string() {
            let message = format!("token issued for {identity}, not {claimed}");
            return Err(Error::new(Kind::Denied, "ERR_PERMISSION_DENIED", message));
        }
        Ok(task)
    }

    /// The ids and workspaces of what is below a task, in the same workspace.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn descendants(&self, task: &Task, most: i64) -> Result<Vec<Uuid>, Error> {
        let (id, workspace) = (task.id, task.workspace.clone());
        let below = self.0.gate.scan_tasks(move |tx| {
            let workspace = workspace.clone();
            Box::pin(async move { sql::descendants(tx, id, &workspace, most).await })
        });
        below.await
    }

    /// How many tasks there are, by state. Reads every task: for people who ask, not for every message.
    ///
    /// # Errors
    /// [`Kind::Denied`], [`Kind::Unavailable`].
    pub async fn counts(&self, caller: &Caller) -> Result<Vec<(State, i64)>, Error> {
        self.0.gate.authorize(caller, Inspect("system"))?;
        self.0.gate.scan_tasks(sql::counts).await
    }
}

/// Where a page begins: behind a time of change, and an id.
type Before = (i64, String);

fn page_token(text: &str) -> Result<Before, Error> {
    if text.is_empty() {
        // Every id is smaller than this.
        return Ok((i64::MAX, "~".to_owned()));
    }
    let parse = || {
        let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
        let text = String::from_utf8(bytes).ok()?;
        let (at, id) = text.split_once('|')?;
        // The published token counts microseconds.
        Some((at.parse::<i64>().ok()? / 1000, decide::id(id)?.to_string()))
    };
    parse().ok_or_else(|| Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", format!("invalid page_token: {text:?}")))
}

fn next_token(task: &Task) -> String {
    URL_SAFE_NO_PAD.encode(format!("{}|{}", task.updated_at.saturating_mul(1000), task.id))
}

/// `,a,b,`, so that one of them is found by `,a,`.
fn words<'a>(all: impl Iterator<Item = &'a str>) -> String {
    let mut text = String::new();
    all.for_each(|word| text.extend([",", word]));
    if text.is_empty() { text } else { text + "," }
}

fn select(
    tx: &mut ReadTx,
    filter: Filter,
    party: String,
    before: Before,
) -> TxFuture<'_, Page, trunkline_store::ledger::Error> {
    Box::pin(async move {
        let (by, limit) = (sql::By::of(&filter), usize::try_from(filter.limit).unwrap_or(usize::MAX));
        let (mut before, mut offset) = (before, filter.offset.max(0));
        let params = params(&filter, party);
        let mut page = Page { total: sql::count(tx, by, &params, COUNT_MAX).await?, ..Page::default() };
        let mut bytes = 0;
        loop {
            // One more than the page takes tells whether there is a next page.
            let most = PIECE.min(filter.limit - page.tasks.len() as i64 + 1);
            let piece = sql::list(tx, by, &params, &before, (most, offset)).await?;
            let is_last = (piece.len() as i64) < most;
            for (task, size) in piece {
                bytes += size;
                let is_full = page.tasks.len() == limit || bytes > LIST_BYTES_MAX;
                if let Some(last) = page.tasks.last().filter(|_| is_full) {
                    page.next = next_token(last);
                    return Ok(page);
                }
                (before, offset) = ((task.updated_at, task.id.to_string()), 0);
                page.tasks.push(task);
            }
            if is_last {
                return Ok(page);
            }
        }
    })
}

/// What every list is filtered by.
fn params(filter: &Filter, party: String) -> [Value; 16] {
    let states = |statuses: &[Status]| words(statuses.iter().flat_map(|status| status.states()).map(State::word));
    let classes: Vec<String> = filter.except_classes.iter().map(ToString::to_string).collect();
    let only =
        if filter.dead_letters { words([State::DeadLetter.word()].into_iter()) } else { states(&filter.statuses) };
    [
        filter.workspace.as_str().into(),
        filter.kind.as_str().into(),
        only.into(),
        states(&filter.except_statuses).into(),
        filter.root.as_str().into(),
        filter.correlation.as_str().into(),
        filter.context.as_str().into(),
        filter.creator.as_str().into(),
        filter.subject.as_str().into(),
        i64::from(filter.class).into(),
        words(classes.iter().map(String::as_str)).into(),
        filter.priority.into(),
        filter.min_priority.into(),
        filter.changed_after.into(),
        party.into(),
        filter.parent.as_str().into(),
    ]
}
