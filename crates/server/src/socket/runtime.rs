//! Somebody who runs turns of clients: what it tells is kept before it is acknowledged, and what clients ask reaches it.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use futures_util::{FutureExt as _, future::BoxFuture};
use tokio::time::sleep_until;
use trunkline_agent_socket::{
    Close, Envelope, Type,
    close::code,
    envelope,
    link::{Hello, Said},
    transport::{Receiver, Sender},
};
use trunkline_core::{
    Error,
    socket::{Ask, Duty, Need, Permit, Teller},
};

use super::{Socket, ends, failed, record::Pack};

/// Records of one append, their events, and their size: below what the log takes at once.
const RECORDS_AT_ONCE: usize = 4000;
const TELL_AT_ONCE: usize = 16_000;
const TELL_BYTES: usize = 8 * 1024 * 1024;

/// Clients that are remembered; beyond it all are met anew.
const CLIENTS_MAX: usize = 10_000;

struct Runtime<'a, S> {
    socket: &'a mut Socket<S>,
    duty: Arc<Duty>,
    generation: String,
    recovered: HashSet<String>,
    teller: Arc<Teller>,
    /// Clients that it told something, and whether it serves them: then their streams are settled.
    clients: HashMap<String, Option<Permit>>,
    /// As of which that is so.
    changes: u64,
    /// What waits for the append before it, by client: one record for each, or a few.
    told: Vec<(Permit, Pack)>,
    /// The record in the making of each client.
    packs: HashMap<String, usize>,
    told_events: usize,
    told_bytes: usize,
    /// The last number of what was heard.
    heard_to: u64,
    acked: u64,
    is_numbered: bool,
}

pub(super) async fn serve<S: Sender>(
    socket: &mut Socket<S>,
    receiver: &mut impl Receiver,
    hello: Hello,
) -> Result<(), Close> {
    let generation = hello.runtime_generation.clone().filter(|generation| !generation.is_empty());
    let generation = generation.ok_or_else(|| Close::new(code::UNREADABLE, "runtimeGeneration: missing"))?;
    let shared = socket.shared.clone();
    let recovered: HashSet<String> = hello.recovered_turns.iter().cloned().collect();
    let duty = shared.sockets.attach(&socket.caller, &generation, recovered.clone()).map_err(|e| failed(&e))?;
    // Nobody else's, whatever it calls itself.
    let name = format!("rt::{}::{generation}", socket.caller.subject.id);
    let teller = shared.sockets.teller(&name).await.map_err(|e| failed(&e))?;
    let heard_to = teller.told_to();
    let welcome = Envelope::new(Type::Welcome).with(&socket.link.welcome(&hello, heard_to));
    socket.send(vec![Envelope { runtime_generation: Some(generation.clone()), ..welcome }.to_json()]).await?;
    let mut runtime = Runtime {
        socket,
        duty: duty.into(),
        generation,
        recovered,
        teller: teller.into(),
        clients: HashMap::new(),
        changes: shared.sockets.changes(),
        told: Vec::new(),
        packs: HashMap::new(),
        told_events: 0,
        told_bytes: 0,
        heard_to,
        acked: heard_to,
        is_numbered: false,
    };
    for desk in shared.desks.all() {
        if runtime.duty.serves(desk.client()) {
            let settled = desk.settle(&shared.sockets, &runtime.generation, &runtime.recovered).await;
            settled.map_err(|e| failed(&e))?;
        }
    }
    runtime.run(receiver).await
}

impl<S: Sender> Runtime<'_, S> {
    async fn run(&mut self, receiver: &mut impl Receiver) -> Result<(), Close> {
        // Both go on however often something else comes first.
        let mut asks = next(self.duty.clone());
        let mut telling: Option<BoxFuture<'static, Result<u64, Error>>> = None;
        loop {
            if telling.is_none() && !self.told.is_empty() {
                telling = Some(self.tell());
            }
            if telling.is_none() && self.is_numbered && self.heard_to > self.acked {
                // What another one has to tell now is not kept, and need not be told again.
                self.ack(self.heard_to).await?;
            }
            self.socket.beat(|| Envelope::new(Type::Heartbeat)).await?;
            let due = self.socket.until_due()?;
            let has_room = self.has_room();
            tokio::select! {
                kept = told(&mut telling) => {
                    telling = None;
                    let through = kept.map_err(|e| failed(&e))?;
                    if self.is_numbered {
                        self.ack(through).await?;
                    }
                }
                frame = receiver.next(), if has_room => {
                    let mut frame = Some(frame);
                    // What else is there goes into the same append.
                    while let Some(next) = frame {
                        match self.socket.hear(next)? {
                            Some(said) => self.take(said).await?,
                            None => return self.leave(telling).await,
                        }
                        frame = if self.has_room() { receiver.next().now_or_never() } else { None };
                    }
                }
                asked = &mut asks => {
                    self.pass_on(asked.map_err(|e| failed(&e))?).await?;
                    asks = next(self.duty.clone());
                }
                () = sleep_until(due) => {}
                ending = &mut self.socket.ending => {
                    self.leave(telling).await?;
                    return Err(ends(ending));
                }
            }
        }
    }

    /// What was said before it went is kept, though nobody hears so.
    async fn leave(&mut self, telling: Option<BoxFuture<'static, Result<u64, Error>>>) -> Result<(), Close> {
        if let Some(telling) = telling {
            telling.await.map_err(|e| failed(&e))?;
        }
        if !self.told.is_empty() {
            self.tell().await.map_err(|e| failed(&e))?;
        }
        Ok(())
    }

    async fn ack(&mut self, through: u64) -> Result<(), Close> {
        self.acked = through;
        self.socket.send(vec![Envelope { ack: Some(through), ..Envelope::new(Type::Ack) }.to_json()]).await
    }

    /// Appends what waits.
    fn tell(&mut self) -> BoxFuture<'static, Result<u64, Error>> {
        let (sockets, teller) = (self.socket.shared.sockets.clone(), self.teller.clone());
        let (told, through, is_numbered) = (std::mem::take(&mut self.told), self.heard_to, self.is_numbered);
        let told = told.into_iter().map(|(permit, pack)| (permit, pack.freeze())).collect();
        self.packs.clear();
        (self.told_events, self.told_bytes) = (0, 0);
        Box::pin(async move {
            match is_numbered {
                true => sockets.tell_numbered(told, &teller, through).await?,
                false => sockets.tell(told).await?,
            }
            Ok(through)
        })
    }

    async fn take(&mut self, said: Said) -> Result<(), Close> {
        let mut event = match said {
            Said::Event(event) => event,
            Said::Has(number) => {
                self.duty.has(number);
                return Ok(());
            }
            _ => return Ok(()),
        };
        if let Some(number) = event.seq {
            self.is_numbered = true;
            if number <= self.heard_to {
                return Ok(());
            }
            self.heard_to = number;
        }
        let client = event.client_id.take().unwrap_or_default();
        event.runtime_generation = Some(self.generation.clone());
        if let Some(turn) = &event.turn_id {
            self.duty.heard_of(&client, turn);
        }
        if self.changes != self.socket.shared.sockets.changes() {
            self.changes = self.socket.shared.sockets.changes();
            self.clients.clear();
            self.packs.clear();
        }
        let at = match self.packs.get(&client) {
            Some(at) if self.told[*at].1.has_room() => *at,
            _ => {
                let permit = match self.clients.get(&client) {
                    Some(permit) => permit.clone(),
                    None => self.meet(&client).await?,
                };
                let Some(permit) = permit else {
                    tracing::debug!(client, "a runtime tells what another one has to tell now");
                    return Ok(());
                };
                self.told.push((permit, Pack::default()));
                self.packs.insert(client, self.told.len() - 1);
                self.told.len() - 1
            }
        };
        self.told_events += 1;
        self.told_bytes += self.told[at].1.push(&event);
        Ok(())
    }

    fn has_room(&self) -> bool {
        self.told.len() < RECORDS_AT_ONCE && self.told_events < TELL_AT_ONCE && self.told_bytes < TELL_BYTES
    }

    /// A client that it tells something for the first time.
    async fn meet(&mut self, client: &str) -> Result<Option<Permit>, Close> {
        let shared = self.socket.shared.clone();
        let permit = shared.sockets.enter(&self.socket.caller, client, Need::Serve).map_err(|e| failed(&e))?;
        let permit = Some(permit).filter(|_| self.duty.serves(client));
        if let Some(permit) = &permit {
            let desk = shared.desks.desk(permit);
            desk.settle(&shared.sockets, &self.generation, &self.recovered).await.map_err(|e| failed(&e))?;
        }
        if self.clients.len() >= CLIENTS_MAX {
            self.clients.clear();
        }
        self.clients.insert(client.to_owned(), permit.clone());
        Ok(permit)
    }

    /// What clients ask.
    async fn pass_on(&mut self, asks: Vec<Ask>) -> Result<(), Close> {
        let frame = |ask: Ask| {
            let mut frame = String::with_capacity(128 + ask.body.len());
            envelope::begin(&mut frame, Some(&ask.client), Some(&ask.socket));
            frame.extend([",\"ask\":", &ask.number.to_string(), &ask.body]);
            frame
        };
        self.socket.send(asks.into_iter().map(frame).collect()).await
    }
}

fn next(duty: Arc<Duty>) -> BoxFuture<'static, Result<Vec<Ask>, Error>> {
    Box::pin(async move { duty.next().await })
}

async fn told(telling: &mut Option<BoxFuture<'static, Result<u64, Error>>>) -> Result<u64, Error> {
    match telling {
        Some(telling) => telling.await,
        None => std::future::pending().await,
    }
}
