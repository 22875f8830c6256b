//! `token`: API keys of a running server, and a way in when the administrator's is lost.

use serde_json::json;
use trunkline::Server;
use trunkline_client::{admin::TokenCreateRequest, proto::TokenInfo};

use super::{
    Done, block_on,
    client::Connect,
    output::{Output, Row, time},
    say,
    serve::Settings,
};

/// Keys on one page of the list.
const PAGE: u32 = 1000;

#[derive(clap::Subcommand)]
pub(crate) enum Token {
    /// Makes a key and prints it, once.
    Create(Box<Create>),
    /// Lists the keys, without their secrets.
    List {
        /// Revoked ones too.
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        output: Output,
        #[command(flatten)]
        connect: Connect,
    },
    /// Revokes a key and ends the sessions that came in with it.
    Revoke {
        /// Its id, as listed.
        id: String,
        #[command(flatten)]
        connect: Connect,
    },
    /// Makes another administrator's key in the data directory of a server that is not running, and prints it, once.
    Admin(Settings),
}

#[derive(clap::Args)]
pub(crate) struct Create {
    /// What to call it.
    name: String,
    /// The kind of principal that may use it: agent, task, user, orchestrator, service, bridge, …
    #[arg(long, value_name = "KIND", required_unless_present_any = ["sandbox", "sandboxes", "sockets", "runtime"])]
    kind: Option<String>,
    /// For the sandbox with this id, which comes over HTTP.
    #[arg(long, value_name = "ID", conflicts_with_all = ["kind", "holder", "sandboxes"])]
    sandbox: Option<String>,
    /// What it opens of sandboxes, over HTTP: to watch them, or also to make them and tell them what to do.
    #[arg(long, value_name = "RIGHT", value_parser = ["read", "write"], requires = "holder")]
    sandboxes: Option<String>,
    /// For browsers: it shows the streams of clients of the socket surface that this pattern names, such as `web-*`.
    #[arg(long = "socket", value_name = "PATTERN", requires = "holder", conflicts_with = "sandbox")]
    sockets: Option<String>,
    /// For a runtime: it serves the clients of the socket surface that this pattern names.
    #[arg(long, value_name = "PATTERN", requires = "holder", conflicts_with = "sandbox")]
    runtime: Option<String>,
    /// Whom it is for: a user's id, or an identity that may end in `*`, such as `ag::prod::chat::*`.
    #[arg(long = "for", value_name = "WHOM", default_value = "")]
    holder: String,
    /// A pattern of workspaces, and of projects of sandboxes, that it opens, such as `team-*`; may be repeated [default: all].
    #[arg(long = "workspace", value_name = "PATTERN")]
    workspaces: Vec<String>,
    /// It ends after so many hours [default: never].
    #[arg(long, value_name = "HOURS", default_value_t = 0)]
    hours: i32,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connect: Connect,
}

pub(crate) fn run(token: Token) -> Done {
    block_on(async {
        match token {
            Token::Create(wanted) => create(*wanted).await?,
            Token::List { all, output, connect } => list(&connect, all, &output).await?,
            Token::Revoke { id, connect } => {
                let client = connect.administrator().await?;
                client.admin().revoke_token(&id).await?;
                client.close().await;
                say(format_args!("revoked {id}"));
            }
            Token::Admin(settings) => {
                let key = Server::make_admin_key(&settings.load()?).await?;
                say(format_args!("admin-key {} (shown once; send it as x-api-key)", key.reveal()));
            }
        }
        Ok(())
    })
}

async fn create(args: Create) -> Done {
    let Create { name, kind, sandbox, sandboxes, sockets, runtime, holder, workspaces, hours, json, connect } = args;
    let scopes: Vec<_> = [("sandbox", sandboxes), ("socket", sockets), ("socket-runtime", runtime)]
        .into_iter()
        .filter_map(|(word, right)| right.map(|right| format!("{word}:{right}")))
        .collect();
    let is_for_http = sandbox.is_some() || !scopes.is_empty();
    let kind = kind.unwrap_or_else(|| if sandbox.is_some() { "sandbox" } else { "user" }.to_owned());
    let wanted = TokenCreateRequest {
        name,
        principal_type: kind,
        workspace_patterns: workspaces,
        scopes,
        expires_in_hours: hours,
        created_by: sandbox.unwrap_or(holder),
    };
    let client = connect.administrator().await?;
    let (token, secret) = client.admin().create_token(wanted).await?;
    client.close().await;
    if json {
        say(json!({"id": token.id, "secret": secret}));
    } else {
        let how = if is_for_http { "as bearer token" } else { "as x-api-key" };
        say(format_args!("{secret} (shown once; send it {how}; id {})", token.id));
    }
    Ok(())
}

async fn list(connect: &Connect, include_revoked: bool, output: &Output) -> Done {
    let client = connect.administrator().await?;
    let all = || async {
        let mut rows = Vec::new();
        loop {
            let (tokens, total) = client.admin().tokens(include_revoked, PAGE, rows.len() as u32).await?;
            rows.extend(tokens.iter().map(row));
            if tokens.is_empty() || rows.len() as u64 >= total {
                return Ok(rows);
            }
        }
    };
    output.show(all).await?;
    client.close().await;
    Ok(())
}

fn row(token: &TokenInfo) -> Row {
    vec![
        ("id", json!(token.id)),
        ("state", json!(if token.revoked { "revoked" } else { "active" })),
        ("kind", json!(token.principal_type)),
        ("for", json!(token.created_by)),
        ("workspaces", json!(token.workspace_patterns)),
        ("expires", time(token.expires_at)),
        ("name", json!(token.name)),
    ]
}
