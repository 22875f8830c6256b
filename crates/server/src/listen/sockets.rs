//! The sockets that a server listens on: bound here, or inherited from the program that started this one; and passed on to the
//! one that takes its place. While a socket is open, clients that connect wait instead of being refused.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    os::unix::process::CommandExt as _,
    process::Command,
};

use command_fds::{CommandFdExt as _, FdMapping};
use listenfd::ListenFd;
use socket2::{Domain, Socket, Type};

use crate::{app::StartError, config::Listen};

/// Clients of one listener that may wait to be accepted: after a restart they all come at once. The system allows no more
/// unless `net.core.somaxconn` says so.
const BACKLOG: i32 = 4096;

/// The first descriptor that is passed on, and the variables that tell of it: those of `sd_listen_fds(3)`.
const FIRST_FD: i32 = 3;

/// What listeners are called in `LISTEN_FDNAMES`, in the order in which they are passed on.
const NAMES: [&str; 3] = ["grpc", "http", "ops"];

/// Listening sockets for a server: of agents, of browsers and sandboxes, of operators. Closed when dropped.
#[derive(Debug)]
pub struct ListenSockets([TcpListener; 3]);

/// A socket that was passed on and cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    /// It is no TCP socket, or was taken already.
    #[error("it is no TCP socket that could be taken: {0}")]
    Socket(io::Error),
    /// It does not listen.
    #[error("it does not listen")]
    NotListening,
    /// Neither its name nor its address is that of a listener.
    #[error("{address} is none of listen.grpc ({}), listen.http ({}), listen.ops ({}); give it one of these addresses, or name it grpc, http or ops (FileDescriptorName)", listen.grpc, listen.http, listen.ops)]
    Unknown {
        /// Where it listens.
        address: SocketAddr,
        /// Where the server is to listen.
        listen: Box<Listen>,
    },
    /// There are two for one listener.
    #[error("it is the second for listen.{0}")]
    Second(&'static str),
}

impl ListenSockets {
    /// Binds all three.
    ///
    /// # Errors
    /// [`StartError::Bind`]; nothing is bound then.
    pub fn bind(listen: &Listen) -> Result<Self, StartError> {
        Self::complete([None, None, None], listen)
    }

    /// Takes those that this process inherited, as systemd passes them on (`LISTEN_FDS`), and binds the others. A socket is
    /// for the listener whose name it has (`LISTEN_FDNAMES`: `grpc`, `http`, `ops`), else for the one whose address it has.
    /// Takes them once; to be called before there are threads that read variables of the environment.
    ///
    /// # Errors
    /// [`StartError::Inherit`], [`StartError::Bind`].
    pub fn inherit(listen: &Listen) -> Result<Self, StartError> {
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        let (mut names, mut passed) = (names.split(':'), ListenFd::from_env());
        let mut found = [None, None, None];
        for number in 0..passed.len() {
            let wrong = |source| StartError::Inherit { number, source };
            let name = names.next().unwrap_or_default();
            let socket = passed.take_tcp_listener(number).map_err(|error| wrong(InheritError::Socket(error)))?;
            let Some(socket) = socket else { continue };
            let place = check(&socket, name, listen).map_err(wrong)?;
            if found[place].replace(socket).is_some() {
                return Err(wrong(InheritError::Second(NAMES[place])));
            }
        }
        Self::complete(found, listen)
    }

    fn complete(found: [Option<TcpListener>; 3], listen: &Listen) -> Result<Self, StartError> {
        let [grpc, http, ops] = found;
        let or_bind = |found: Option<TcpListener>, address| found.map_or_else(|| bind(address), Ok);
        Ok(Self([or_bind(grpc, listen.grpc)?, or_bind(http, listen.http)?, or_bind(ops, listen.ops)?]))
    }

    /// The same sockets once more, to accept from. Needs a runtime.
    pub(crate) fn accepting(&self) -> io::Result<[(tokio::net::TcpListener, SocketAddr); 3]> {
        let [grpc, http, ops] = &self.0;
        let again = |socket: &TcpListener| {
            let socket = tokio::net::TcpListener::from_std(socket.try_clone()?)?;
            let address = socket.local_addr()?;
            Ok::<_, io::Error>((socket, address))
        };
        Ok([again(grpc)?, again(http)?, again(ops)?])
    }

    /// Replaces this process by the program of a command, which inherits the sockets under the same process id: clients that
    /// connect meanwhile wait for it. Returns only if that fails; the process is then good for nothing but to end.
    #[must_use]
    pub fn exec(self, mut command: Command) -> io::Error {
        command.env("LISTEN_PID", std::process::id().to_string()).env("LISTEN_FDS", NAMES.len().to_string());
        // A manager of sockets may have numbered them from another one on.
        command.env("LISTEN_FDNAMES", NAMES.join(":")).env_remove("LISTEN_FDS_FIRST_FD");
        let numbered = self.0.into_iter().zip(FIRST_FD..);
        let passed = numbered.map(|(socket, child_fd)| FdMapping { parent_fd: socket.into(), child_fd });
        match command.fd_mappings(passed.collect()) {
            Ok(command) => command.exec(),
            Err(error) => io::Error::other(error),
        }
    }
}

/// Which listener an inherited socket is for.
fn check(socket: &TcpListener, name: &str, listen: &Listen) -> Result<usize, InheritError> {
    if !rustix::net::sockopt::socket_acceptconn(socket).is_ok_and(|listens| listens) {
        return Err(InheritError::NotListening);
    }
    // How it was passed on says nothing about it.
    socket.set_nonblocking(true).map_err(InheritError::Socket)?;
    let address = socket.local_addr().map_err(InheritError::Socket)?;
    let named = NAMES.iter().position(|known| *known == name);
    let placed = [listen.grpc, listen.http, listen.ops].iter().position(|known| *known == address);
    named.or(placed).ok_or(InheritError::Unknown { address, listen: Box::new(*listen) })
}

fn bind(address: SocketAddr) -> Result<TcpListener, StartError> {
    let bound = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        // Connections of the server before this one may still hold the address.
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    bound().map_err(|source| StartError::Bind { address, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free() -> SocketAddr {
        ([127, 0, 0, 1], 0).into()
    }

    #[test]
    fn an_inherited_socket_is_known_by_its_name_then_by_its_address() {
        let [one, other] = [bind(free()).unwrap(), bind(free()).unwrap()];
        let listen = Listen { http: one.local_addr().unwrap(), ..Listen::default() };
        assert_eq!(check(&one, "ops", &listen).unwrap(), 2);
        assert_eq!(check(&one, "trunkline.socket", &listen).unwrap(), 1);
        let error = check(&other, "trunkline.socket", &listen).unwrap_err().to_string();
        assert!(error.contains(&other.local_addr().unwrap().to_string()), "{error}");
        assert!(error.contains(&format!("listen.http ({})", listen.http)), "{error}");
    }

    #[test]
    fn a_socket_that_does_not_listen_is_refused() {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&free().into()).unwrap();
        assert!(matches!(check(&socket.into(), "grpc", &Listen::default()), Err(InheritError::NotListening)));
    }

    #[test]
    fn an_address_in_use_is_named() {
        let taken = bind(free()).unwrap().local_addr().unwrap();
        let held = bind(taken).unwrap();
        let listen = Listen { grpc: free(), http: free(), ops: held.local_addr().unwrap() };
        let error = ListenSockets::bind(&listen).unwrap_err().to_string();
        assert!(error.contains(&taken.to_string()), "{error}");
    }
}
