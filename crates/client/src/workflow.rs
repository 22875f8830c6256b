//! Workflows: rules, definitions, schedules, executions, state machines, joins.

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use trunkline_proto::v1::{
    AuthorizationContext, WorkflowOperation, WorkflowResponse, WorkflowScheduleAuthorityScope,
    downstream_message::Payload as Down, upstream_message::Payload as Up,
};

pub use trunkline_proto::v1::workflow_operation::OpType as WorkflowOp;

use crate::{
    connection::{Ask, Client},
    error::{Error, Result},
    message::to_json,
    reply,
};

/// What can be done with workflows. Made by [`Client::workflows`]. What they are is JSON, which the engine understands.
#[derive(Clone, Debug)]
pub struct Workflows {
    client: Client,
}

impl Client {
    /// What can be done with workflows.
    #[must_use]
    pub fn workflows(&self) -> Workflows {
        Workflows { client: self.clone() }
    }
}

/// A request about workflows.
#[derive(Clone, Debug)]
#[must_use = "a request is made when it is given to run"]
pub struct Request {
    operation: WorkflowOperation,
    wrong: Option<Error>,
}

impl Request {
    /// Any operation.
    pub fn new(op: WorkflowOp) -> Self {
        Self { operation: WorkflowOperation { op: op.into(), ..WorkflowOperation::default() }, wrong: None }
    }

    /// On the thing with this id.
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.operation.id = id.into();
        self
    }

    /// On the thing inside of it, such as an instance of a state machine.
    pub fn secondary(mut self, id: impl Into<String>) -> Self {
        self.operation.secondary_id = id.into();
        self
    }

    /// In a workspace.
    pub fn workspace(mut self, workspace: impl Into<String>) -> Self {
        self.operation.workspace = workspace.into();
        self
    }

    /// Only those with this status.
    pub fn status(mut self, status: impl Into<String>) -> Self {
        self.operation.status_filter = status.into();
        self
    }

    /// With this definition.
    pub fn data(mut self, data: impl Into<Bytes>) -> Self {
        self.operation.data = data.into();
        self
    }

    /// With this definition, as JSON.
    pub fn json(mut self, data: &(impl Serialize + ?Sized)) -> Self {
        match to_json(data) {
            Ok(data) => self.operation.data = data.into(),
            Err(error) => self.wrong = Some(error),
        }
        self
    }

    /// On behalf of somebody else, by a grant.
    pub fn authorized(mut self, authorization: impl Into<AuthorizationContext>) -> Self {
        self.operation.authorization = Some(authorization.into());
        self
    }

    /// How far a schedule may act on behalf of who made it.
    pub fn schedule_scope(mut self, scope: WorkflowScheduleAuthorityScope) -> Self {
        self.operation.schedule_authority_scope = Some(scope);
        self
    }
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Answer {
    /// In words.
    pub message: String,
    /// As the engine says it: JSON.
    pub data: Bytes,
    /// How many there are, of a list.
    pub total: u64,
}

impl Answer {
    /// What it says.
    ///
    /// # Errors
    /// [`Kind::Invalid`](crate::Kind::Invalid) if it is not what was expected.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.data)
            .map_err(|e| Error::invalid(format!("an answer about workflows: {e}")).with_source(e))
    }
}

impl Workflows {
    /// Makes a request.
    ///
    /// # Errors
    /// This and all others here: what the server refused, and [`Kind::Timeout`](crate::Kind::Timeout) after 10 s.
    pub async fn run(&self, request: Request) -> Result<Answer> {
        if let Some(wrong) = request.wrong {
            return Err(wrong);
        }
        let name = request.operation.op().as_str_name();
        let idempotent = name.starts_with("LIST_") || name.starts_with("GET_");
        let ask = Ask { idempotent, ..Ask::change("use workflows") };
        let build = |request_id| Up::WorkflowOp(Box::new(WorkflowOperation { request_id, ..request.operation }));
        let reply = reply!(self.client.core.ask(ask, build).await?, Down::WorkflowResponse)?;
        let WorkflowResponse { success, error, message, data, total_count, .. } = *reply;
        if !success {
            return Err(Error::from_words(&error));
        }
        Ok(Answer { message, data, total: u64::try_from(total_count).unwrap_or(0) })
    }

    /// Makes a schedule in one workspace; with `upsert`, in place of one with the same name.
    ///
    /// # Errors
    /// As [`Workflows::run`]; [`Kind::Invalid`](crate::Kind::Invalid) unless the workspace is an exact one.
    pub async fn create_schedule(
        &self,
        workspace: &str,
        schedule: &(impl Serialize + ?Sized),
        upsert: bool,
    ) -> Result<Answer> {
        if workspace.is_empty() || workspace.contains('*') {
            return Err(Error::invalid(format!("a schedule lives in one workspace, and {workspace:?} is none")));
        }
        let op = if upsert { WorkflowOp::UpsertSchedule } else { WorkflowOp::CreateSchedule };
        self.run(Request::new(op).workspace(workspace).json(schedule)).await
    }

    /// Removes a schedule.
    ///
    /// # Errors
    /// As [`Workflows::run`].
    pub async fn delete_schedule(&self, workspace: &str, id: &str) -> Result<Answer> {
        self.run(Request::new(WorkflowOp::DeleteSchedule).workspace(workspace).id(id)).await
    }

    /// The schedules of a workspace.
    ///
    /// # Errors
    /// As [`Workflows::run`].
    pub async fn schedules(&self, workspace: &str) -> Result<Answer> {
        self.run(Request::new(WorkflowOp::ListSchedules).workspace(workspace)).await
    }
}
