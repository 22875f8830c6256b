//! Rules: looked at, made and removed. Groups, roles and the audit log come later.

use trunkline_core::{
    Error, Kind,
    caller::Caller,
    gate::{
        Gate,
        rules::{Fallback, Level, Name, Rule},
    },
    rule::{self, Filter, Grant},
};
use trunkline_proto::v1::{
    AclCleanupResult, AclFallbackPolicyInfo, AclGrantRequest, AclOperation, AclResponse, AclRuleFilter, AclRuleInfo,
    acl_operation::OpType,
};

use super::super::{convert, outbound::fitting};

pub(super) async fn handle(gate: &Gate, caller: &Caller, operation: AclOperation) -> AclResponse {
    let request_id = operation.request_id.clone();
    match run(gate, caller, operation).await {
        Ok(reply) => AclResponse { success: true, request_id, ..reply },
        Err(error) => AclResponse { error: error.to_string(), request_id, ..AclResponse::default() },
    }
}

async fn run(gate: &Gate, caller: &Caller, operation: AclOperation) -> Result<AclResponse, Error> {
    if !convert::is_direct(operation.authorization.as_ref()) {
        return Err(invalid("invalid authorization context: authority grants are not supported yet"));
    }
    let empty = AclResponse::default;
    Ok(match OpType::try_from(operation.op) {
        Ok(OpType::ListRules) => {
            let rules = rule::list(gate, caller, &filter(operation.rule_filter.as_ref()))?;
            let filter = operation.rule_filter.unwrap_or_default();
            let total_rules = rules.len() as i32;
            let rules = fitting(super::page(rules, filter.offset, filter.limit).map(|rule| info(&rule)));
            AclResponse { rules, total_rules, ..empty() }
        }
        Ok(OpType::GetRule) => {
            let rules = rule::list(gate, caller, &filter(operation.rule_filter.as_ref()))?;
            let wanted = |rule: &&Rule| operation.rule_id.is_empty() || rule.id == operation.rule_id;
            let missing = || Error::new(Kind::NotFound, "ERR_NOT_FOUND", "failed to get ACL rule: ACL rule not found");
            AclResponse { rule: Some(info(rules.iter().find(wanted).ok_or_else(missing)?)), ..empty() }
        }
        Ok(OpType::Grant) => {
            let wanted = operation.grant_request.ok_or_else(|| invalid("grant_request required for GRANT"))?;
            let refused = |e: Error| Error { message: format!("failed to grant ACL access: {e}").into(), ..e };
            let grant = grant(wanted).map_err(refused)?;
            let rule = rule::grant(gate, caller, grant).await;
            let rule = rule.map_err(|e| if e.kind == Kind::Invalid { refused(e) } else { e })?;
            AclResponse { message: "ACL access granted".to_owned(), rule: Some(info(&rule)), ..empty() }
        }
        Ok(OpType::Revoke) => {
            rule::revoke(gate, caller, &filter(operation.rule_filter.as_ref()), &operation.rule_id).await?;
            AclResponse { message: "ACL access revoked".to_owned(), ..empty() }
        }
        Ok(OpType::GetFallbackPolicy) => {
            let category = operation.rule_category;
            let refused = |e: Error| match e.kind {
                Kind::NotFound => Error { message: format!("failed to get fallback policy: {e}").into(), ..e },
                _ => e,
            };
            let fallback = rule::fallback(gate, caller, &category).map_err(refused)?;
            AclResponse { fallback_policy: Some(fallback_info(category, fallback)), ..empty() }
        }
        Ok(OpType::SetFallbackPolicy) => {
            let wanted = operation.fallback_request;
            let wanted = wanted.ok_or_else(|| invalid("fallback_request required for SET_FALLBACK_POLICY"))?;
            let level = Level::new(wanted.fallback_access_level.into())?;
            let fallback = rule::set_fallback(gate, caller, &wanted.rule_category, level, wanted.updated_by).await?;
            let fallback_policy = Some(fallback_info(wanted.rule_category, fallback));
            AclResponse { message: "fallback policy updated successfully".to_owned(), fallback_policy, ..empty() }
        }
        Ok(OpType::CleanupExpired) => {
            let deleted_count = rule::clean_up(gate, caller).await? as i64;
            let message = "expired ACL rules cleaned up".to_owned();
            let cleanup_result = Some(AclCleanupResult { deleted_count, message: message.clone() });
            AclResponse { message, cleanup_result, ..empty() }
        }
        Ok(other) => {
            let message = format!("ACL operation {} is not supported yet", other.as_str_name());
            return Err(Error::new(Kind::Unimplemented, "ERR_NOT_IMPLEMENTED", message));
        }
        Err(_) => return Err(invalid("unknown ACL operation")),
    })
}

fn filter(filter: Option<&AclRuleFilter>) -> Filter {
    let Some(filter) = filter else { return Filter::default() };
    Filter {
        principal_kind: filter.principal_type.clone(),
        principal_id: filter.principal_id.clone(),
        resource_kind: filter.resource_type.clone(),
        resource_id: filter.resource_id.clone(),
    }
}

fn grant(wanted: AclGrantRequest) -> Result<Grant, Error> {
    Ok(Grant {
        principal: Name::new(wanted.principal_type, wanted.principal_id),
        resource: Name::new(wanted.resource_type, wanted.resource_id),
        level: Level::new(wanted.access_level.into())?,
        expires_at: (wanted.expires_at != 0).then_some(wanted.expires_at),
        reason: wanted.reason,
        granted_by: wanted.granted_by,
    })
}

fn info(rule: &Rule) -> AclRuleInfo {
    AclRuleInfo {
        rule_id: rule.id.clone(),
        principal_type: rule.principal.kind.clone(),
        principal_id: rule.principal.id.clone(),
        resource_type: rule.resource.kind.clone(),
        resource_id: rule.resource.id.clone(),
        access_level: rule.level.number() as i32,
        access_level_name: rule.level.to_string(),
        granted_by: rule.granted_by.clone(),
        granted_at: rule.granted_at,
        expires_at: rule.expires_at.unwrap_or(0),
        reason: rule.reason.clone(),
    }
}

fn fallback_info(category: String, fallback: Fallback) -> AclFallbackPolicyInfo {
    AclFallbackPolicyInfo {
        policy_id: category.clone(),
        rule_category: category,
        fallback_access_level: fallback.level.number() as i32,
        fallback_access_level_name: fallback.level.to_string(),
        updated_by: fallback.updated_by,
        updated_at: fallback.updated_at,
    }
}

fn invalid(message: &'static str) -> Error {
    Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message)
}
