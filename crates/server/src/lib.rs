//! Trunkline as a library: a running server with its addresses, its store and a way to stop it.
//!
//! ```
//! # async fn demo() -> Result<(), Box<dyn std::error::Error>> {
//! use trunkline::{Config, Server};
//! let dir = tempfile::tempdir()?;
//! let config = Config { data_dir: dir.path().to_owned(), dev: true, ..Config::on_free_ports() };
//! let server = Server::start(config).await?;
//! println!("gRPC on {}", server.addresses().grpc);
//! server.stop().await;
//! # Ok(()) }
//! # tokio::runtime::Runtime::new().unwrap().block_on(demo()).unwrap();
//! ```

mod agent;
mod app;
mod auth;
mod builder;
pub mod config;
mod conversation;
pub mod demo;
pub mod doctor;
mod error;
mod http;
mod lines;
mod listen;
mod metrics;
mod operator;
mod ops;
mod repeats;
mod sandbox;
mod socket;
mod sse;
mod supervise;
mod tls;

pub use self::socket::Inside;
pub use app::{Addresses, Server, StartError};
pub use builder::Builder;
pub use config::Config;
pub use listen::{InheritError, ListenSockets, raise_descriptor_limit};
pub use trunkline_agent_socket as agent_socket;
pub use trunkline_core::sandbox::{Sandbox, SessionStore, StoreError, StoreFuture, Told};
pub use trunkline_store::fault::Fault;
