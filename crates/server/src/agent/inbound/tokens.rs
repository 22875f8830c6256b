//! API keys: made, looked at, revoked.

use trunkline_core::{
    Error, Kind,
    caller::Caller,
    gate::Administer,
    identity::PrincipalKind,
    session::Sessions,
    token::{self, New, Token},
};
use trunkline_proto::v1::{TokenInfo, TokenOperation, TokenResponse, token_operation::OpType};

use super::super::outbound::fitting;

/// Keys on one page at most, and if nothing is asked for. The published figures.
const PAGE_MAX: i32 = 1000;
const PAGE: i32 = 100;

/// A refusal for want of rights has no typed reply: the published contract has it that way, and its suite insists.
pub(super) async fn handle(
    sessions: &Sessions,
    caller: &Caller,
    operation: TokenOperation,
) -> Result<TokenResponse, Error> {
    sessions.gate().authorize(caller, Administer("tokens"))?;
    let request_id = operation.request_id.clone();
    Ok(match run(sessions, caller, operation).await {
        Ok(reply) => TokenResponse { success: true, request_id, ..reply },
        Err(error) => TokenResponse { error: error.to_string(), request_id, ..TokenResponse::default() },
    })
}

async fn run(sessions: &Sessions, caller: &Caller, operation: TokenOperation) -> Result<TokenResponse, Error> {
    let (gate, id, empty) = (sessions.gate(), operation.token_id.as_str(), TokenResponse::default);
    Ok(match OpType::try_from(operation.op) {
        Ok(OpType::List) => {
            let filter = operation.filter.unwrap_or_default();
            let all = token::list(gate, caller, filter.include_revoked).await?;
            let limit = if filter.limit > 0 { filter.limit.min(PAGE_MAX) } else { PAGE };
            let total_count = all.len() as i32;
            let tokens = fitting(super::page(all, filter.offset, limit).map(|token| info(&token)));
            TokenResponse { tokens, total_count, ..empty() }
        }
        Ok(OpType::Get) => TokenResponse { token: Some(info(&token::get(gate, caller, id).await?)), ..empty() },
        Ok(OpType::Create) => {
            let wanted = operation.create_request.ok_or_else(|| invalid("create_request is required".to_owned()))?;
            super::unbuilt::check_scopes(&wanted)?;
            if wanted.principal_type.is_empty() {
                return Err(invalid("principal_type is required".to_owned()));
            }
            let unknown = || invalid(format!("unknown principal type {:?}", wanted.principal_type));
            let new = New {
                kind: PrincipalKind::parse(&wanted.principal_type).ok_or_else(unknown)?,
                name: wanted.name,
                created_by: wanted.created_by,
                workspace_patterns: wanted.workspace_patterns,
                scopes: wanted.scopes,
                expires_in_hours: wanted.expires_in_hours.into(),
            };
            let (token, secret) = token::create(gate, caller, new).await?;
            let plaintext_token = secret.reveal().to_owned();
            let message = "token created".to_owned();
            TokenResponse { message, plaintext_token, created_token: Some(info(&token)), ..empty() }
        }
        Ok(OpType::Delete) => {
            token::revoke(sessions, caller, id, true).await?;
            TokenResponse { message: "deleted".to_owned(), ..empty() }
        }
        Ok(OpType::Revoke) => {
            token::revoke(sessions, caller, id, false).await?;
            TokenResponse { message: "revoked".to_owned(), ..empty() }
        }
        Err(_) => return Err(invalid("unknown token operation".to_owned())),
    })
}

fn info(token: &Token) -> TokenInfo {
    TokenInfo {
        id: token.id.clone(),
        name: token.name.clone(),
        principal_type: token.kind.map_or_else(|| "*".to_owned(), |kind| kind.to_string()),
        workspace_patterns: token.workspace_patterns.clone(),
        scopes: token.scopes.clone(),
        created_by: token.created_by.clone(),
        expires_at: token.expires_at.unwrap_or(0),
        last_used_at: token.last_used_at.unwrap_or(0),
        revoked: token.revoked_at.is_some(),
        revoked_at: token.revoked_at.unwrap_or(0),
        created_at: token.created_at,
        updated_at: token.revoked_at.or(token.last_used_at).unwrap_or(token.created_at),
    }
}

fn invalid(message: String) -> Error {
    Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message)
}
