//! A server whose sessions are kept in plain files: one directory, for each session a `.session` with its record and an
//! `.events` with a line for each time that it told something. Run it twice, and the second goes on where the first was.
//!
//! `cargo run --example own_store -- DIRECTORY PORT`

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    path::PathBuf,
};

use trunkline::{Sandbox, Server, SessionStore, StoreError, StoreFuture, Told};

struct Files(PathBuf);

impl Files {
    fn load_all(&self) -> Result<Vec<(Sandbox, Vec<Told>)>, StoreError> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "session") {
                let session = serde_json::from_slice(&fs::read(&path)?)?;
                let events = fs::read_to_string(path.with_extension("events")).unwrap_or_default();
                let told = events.lines().filter_map(|line| {
                    let (at_ms, events) = line.split_once(' ')?;
                    Some(Told { at_ms: at_ms.parse().ok()?, events: events.to_owned().into() })
                });
                all.push((session, told.collect()));
            }
        }
        Ok(all)
    }

    /// Written beside and renamed, so that there is always a whole one.
    fn save_one(&self, session: &Sandbox) -> Result<(), StoreError> {
        let path = self.0.join(format!("{}.session", session.id));
        let mut file = File::create(path.with_extension("new"))?;
        file.write_all(&serde_json::to_vec(session)?)?;
        file.sync_all()?;
        Ok(fs::rename(path.with_extension("new"), path)?)
    }

    fn append_one(&self, id: &str, told: &Told) -> Result<(), StoreError> {
        let mut file = OpenOptions::new().create(true).append(true).open(self.0.join(format!("{id}.events")))?;
        // One line each: JSON has no line breaks but between its tokens.
        let events: Vec<u8> = told.events.iter().copied().filter(|byte| !matches!(byte, b'\n' | b'\r')).collect();
        file.write_all(&[format!("{} ", told.at_ms).as_bytes(), &events, b"\n"].concat())?;
        Ok(file.sync_data()?)
    }

    fn remove_one(&self, id: &str) -> Result<(), StoreError> {
        for kind in ["events", "session"] {
            match fs::remove_file(self.0.join(format!("{id}.{kind}"))) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Files are written where the server waits; a store with a network in it would await.
impl SessionStore for Files {
    fn load(&self) -> StoreFuture<'_, Vec<(Sandbox, Vec<Told>)>> {
        Box::pin(async { self.load_all() })
    }

    fn save<'a>(&'a self, session: &'a Sandbox) -> StoreFuture<'a, ()> {
        Box::pin(async { self.save_one(session) })
    }

    fn append<'a>(&'a self, id: &'a str, told: &'a Told) -> StoreFuture<'a, ()> {
        Box::pin(async { self.append_one(id, told) })
    }

    fn remove<'a>(&'a self, id: &'a str) -> StoreFuture<'a, ()> {
        Box::pin(async { self.remove_one(id) })
    }
}

#[allow(clippy::print_stdout, reason = "an example says where it is")]
#[tokio::main]
async fn main() -> Result<(), StoreError> {
    let mut args = std::env::args().skip(1);
    let dir = PathBuf::from(args.next().unwrap_or_else(|| "sessions".to_owned()));
    let port = args.next().map_or(Ok(4800), |port| port.parse())?;
    fs::create_dir_all(&dir)?;
    let server = Server::builder().port(port).store(Files(dir)).start().await?;
    println!("http://127.0.0.1:{}/sessions, until Ctrl-C", server.port());
    tokio::signal::ctrl_c().await?;
    server.close().await;
    Ok(())
}
