//! Tasks: made, changed, looked at, followed.

use std::collections::BTreeMap;

use futures_util::FutureExt as _;
use trunkline_core::{
    Error, Kind,
    caller::Caller,
    task::{Event, Tasks},
};
use trunkline_proto::v1::{
    CreateTaskRequest, CreateTaskResponse, ErrorResponse, ProgressReport, TaskOperation, TaskOperationResponse,
    TaskQuery, TaskQueryResponse, downstream_message::Payload as Down, task_query::OpType,
};

use super::{
    super::{
        connection::{Connection, Request},
        convert::{self, tasks as wire},
    },
    unbuilt,
};
use crate::error::response;

/// Bytes of the reply to a new task.
const SMALL_BYTES_MAX: usize = 4096;

/// Bytes of a reply with a task in it: its metadata, what it waits for, and its texts.
const TASK_BYTES_MAX: usize = 256 * 1024;

/// The next frame is read while the task is on its way to the disk.
pub(super) async fn create(connection: &mut Connection<'_>, request: CreateTaskRequest) {
    let request_id = request.request_id.clone();
    let refusal = {
        let request_id = request_id.clone();
        move |error: &Error| refusal(error, &request_id)
    };
    let checked = if convert::is_direct(request.authorization.as_ref()) {
        unbuilt::check_task(&request)
    } else {
        Err(Error::new(Kind::Denied, "ERR_PERMISSION_DENIED", "invalid authorization context"))
    };
    if let Err(error) = checked {
        refusal(&error).into_iter().for_each(|reply| connection.reply(reply));
        return;
    }
    if let Err(error) = connection.sender.take_task_token() {
        refusal(&error).into_iter().for_each(|reply| connection.reply(reply));
        return;
    }
    let (session, tasks) = (&connection.session, &connection.gateway.tasks);
    let bound = connection.desk.bound.as_ref().map(|task| task.id);
    let created = tasks.create(&session.caller, session.workspace(), bound, wire::create(request)).await;
    match created {
        Ok(created) => {
            let replies = async move {
                match created.await {
                    Ok(_) if request_id.is_empty() => Vec::new(),
                    Ok(created) => vec![Down::CreateTask(Box::new(CreateTaskResponse {
                        success: true,
                        task_id: created.id.to_string(),
                        status: created.status.to_owned(),
                        assigned_to: created.assigned_to,
                        task_token: created.token.map(|token| token.reveal().to_owned()).unwrap_or_default(),
                        request_id,
                        ..CreateTaskResponse::default()
                    }))],
                    Err(error) => refusal(&error),
                }
            };
            let (replies, bytes_max) = (replies.boxed(), SMALL_BYTES_MAX);
            connection.wait_for(Request { replies, is_write: true, bytes_max });
        }
        Err(error) => refusal(&error).into_iter().for_each(|reply| connection.reply(reply)),
    }
}

/// The published order: first the reply, if one was asked for, then the error.
fn refusal(error: &Error, request_id: &str) -> Vec<Down> {
    let mut replies = Vec::new();
    if !request_id.is_empty() {
        replies.push(Down::CreateTask(Box::new(CreateTaskResponse {
            error_code: error.code.to_owned(),
            error_message: error.to_string(),
            request_id: request_id.to_owned(),
            ..CreateTaskResponse::default()
        })));
    }
    replies.push(Down::Error(ErrorResponse { request_id: request_id.to_owned(), ..response(error) }.into()));
    replies
}

/// The next frame is read while the change is on its way to the disk.
pub(super) async fn operate(connection: &mut Connection<'_>, operation: TaskOperation) {
    let (id, request_id, attempt) = (operation.task_id.clone(), operation.request_id.clone(), operation.attempt);
    let unknown = || Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", "unknown task operation");
    let operated = match wire::operation(operation).ok_or_else(unknown) {
        Ok(operation) => connection
            .gateway
            .tasks
            .operate(&connection.session.caller, &id, operation.clone(), attempt)
            .await
            .map(|done| (operation, done)),
        Err(error) => Err(error),
    };
    let failed = |error: &Error, request_id| {
        let reply = TaskOperationResponse { error: error.to_string(), request_id, ..TaskOperationResponse::default() };
        Down::TaskOp(reply.into())
    };
    match operated {
        Ok((operation, done)) => {
            let replies = async move {
                vec![match done.await {
                    Ok(task) => Down::TaskOp(Box::new(TaskOperationResponse {
                        success: true,
                        message: message(&operation).to_owned(),
                        task: Some(wire::info(&task)),
                        request_id,
                        ..TaskOperationResponse::default()
                    })),
                    Err(error) => failed(&error, request_id),
                }]
            };
            let (replies, bytes_max) = (replies.boxed(), TASK_BYTES_MAX);
            connection.wait_for(Request { replies, is_write: true, bytes_max });
        }
        Err(error) => connection.reply(failed(&error, request_id)),
    }
}

/// The published words.
fn message(operation: &trunkline_core::task::Operation) -> &'static str {
    use trunkline_core::task::Operation;
    match operation {
        Operation::Claim => "task claimed",
        Operation::Complete => "task completed",
        Operation::Fail(_) => "task marked as failed",
        Operation::Cancel(_) => "task cancelled",
        Operation::Retry => "task queued for retry",
        Operation::Reject(_) => "task rejected",
        Operation::Pause(_) => "task paused",
        Operation::WaitFor(_) => "task waiting on dependencies",
        Operation::Resume => "task resumed",
    }
}

pub(super) async fn query(connection: &mut Connection<'_>, query: TaskQuery) -> TaskQueryResponse {
    let request_id = query.request_id.clone();
    let (tasks, session) = (&connection.gateway.tasks, &connection.session);
    match look(tasks, session.caller.clone(), session.workspace().map(ToOwned::to_owned), query).await {
        Ok(reply) => TaskQueryResponse { success: true, request_id, ..reply },
        Err(error) => TaskQueryResponse { error: error.to_string(), request_id, ..TaskQueryResponse::default() },
    }
}

async fn look(
    tasks: &Tasks,
    caller: Caller,
    home: Option<String>,
    query: TaskQuery,
) -> Result<TaskQueryResponse, Error> {
    match OpType::try_from(query.op) {
        Ok(OpType::Get) => {
            let task = tasks.get(&caller, &query.task_id).await?;
            Ok(TaskQueryResponse { task: Some(wire::info(&task)), ..TaskQueryResponse::default() })
        }
        Ok(OpType::List) => {
            let filter = wire::filter(query.filter.unwrap_or_default())?;
            let page = tasks.list(&caller, home.as_deref(), filter).await?;
            Ok(TaskQueryResponse {
                tasks: page.tasks.iter().map(wire::info).collect(),
                total_count: i32::try_from(page.total).unwrap_or(i32::MAX),
                next_page_token: page.next,
                ..TaskQueryResponse::default()
            })
        }
        Err(_) => Err(Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", "unknown task query operation")),
    }
}

/// A user that comes to a workspace hears of what runs for it there.
pub(super) async fn take_part(connection: &mut Connection<'_>) {
    let session = &mut connection.session;
    let Some(workspace) = session.workspace().map(ToOwned::to_owned) else { return };
    let attended = match connection.gateway.tasks.participating(&session.caller, &workspace).await {
        Ok(tasks) => tasks.iter().try_for_each(|task| session.attend_task(&workspace, task.id)),
        Err(error) => Err(error),
    };
    if let Err(error) = attended {
        tracing::warn!(%error, identity = %session.caller.identity, "a user does not hear of its tasks");
    }
}

/// What a report says of a task, for those who follow it.
pub(super) fn progress(report: &ProgressReport) -> Event {
    Event::Progress {
        state: report.state.clone(),
        completion: report.completion,
        summary: report.summary.clone(),
        metadata: report.metadata.iter().map(|(key, value)| (key.clone(), value.clone())).collect::<BTreeMap<_, _>>(),
    }
}
