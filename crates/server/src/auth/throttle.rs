//! Peers that present wrong credentials, and the credentials that they presented. Pure but for the clock that callers give.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    time::{Duration, Instant},
};

use ring::digest::{Context, SHA256};

/// So many refusals within [`FAILURES_WINDOW`] make a peer wait for [`COOLDOWN`]. The published figures.
const FAILURES_MAX: u32 = 5;
const FAILURES_WINDOW: Duration = Duration::from_secs(30);
const COOLDOWN: Duration = Duration::from_secs(30);

/// Peers whose failures are remembered. Those beyond it share one record, so that many addresses displace nobody's.
const PEERS_MAX: usize = 10_000;

/// How long a wrong credential is known to be wrong: clients that try the same one again are refused at little cost.
const REFUSED_TTL: Duration = Duration::from_secs(5);

/// Wrong credentials that are remembered; those beyond it cost a look into the ledger each time.
const REFUSED_MAX: usize = 10_000;

/// Shortest time between two walks over what is remembered, to forget what is over.
const FORGET_INTERVAL: Duration = Duration::from_secs(1);

/// A credential's digest, with what it was presented as.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Secret([u8; 32]);

impl Secret {
    pub(super) fn new(kind: &str, secret: &str) -> Self {
        let mut context = Context::new(&SHA256);
        context.update(kind.as_bytes());
        context.update(&[0]);
        context.update(secret.as_bytes());
        let mut digest = [0; 32];
        digest.copy_from_slice(context.finish().as_ref());
        Self(digest)
    }
}

/// Failures, and since when they count.
#[derive(Clone, Copy)]
struct Failures {
    count: u32,
    since: Instant,
}

/// Who failed how often since when, and with what. Bounded.
#[derive(Default)]
pub(super) struct Throttle {
    peers: HashMap<Option<IpAddr>, Failures>,
    /// Of all peers for which there was no room.
    others: Option<Failures>,
    refused: HashMap<Secret, Instant>,
    forgot: Option<Instant>,
}

impl Throttle {
    /// Whether this credential was wrong a moment ago.
    pub(super) fn was_refused(&self, secret: &Secret, now: Instant) -> bool {
        self.refused.get(secret).is_some_and(|at| now.saturating_duration_since(*at) < REFUSED_TTL)
    }

    /// Notes that a credential is wrong.
    pub(super) fn refuse(&mut self, secret: Secret, now: Instant) {
        if self.refused.len() >= REFUSED_MAX {
            self.forget(now);
        }
        if self.refused.len() < REFUSED_MAX {
            self.refused.insert(secret, now);
        }
    }

    /// How long the wrong credentials of a peer are still refused without a reason.
    pub(super) fn cooldown(&self, peer: Option<IpAddr>, now: Instant) -> Option<Duration> {
        self.peers.get(&network(peer)).or(self.others.as_ref()).and_then(|failures| failures.cooldown(now))
    }

    /// Notes that a peer presented a wrong credential. Answers how long it is to wait, if it had failed too often already.
    pub(super) fn failed(&mut self, peer: Option<IpAddr>, now: Instant) -> Option<Duration> {
        let peer = network(peer);
        if self.peers.len() >= PEERS_MAX && !self.peers.contains_key(&peer) {
            self.forget(now);
        }
        let has_room = self.peers.len() < PEERS_MAX || self.peers.contains_key(&peer);
        let first = Failures { count: 0, since: now };
        let failures =
            if has_room { self.peers.entry(peer).or_insert(first) } else { self.others.get_or_insert(first) };
        let cooldown = failures.cooldown(now);
        if failures.is_over(now) {
            *failures = first;
        }
        if cooldown.is_none() {
            failures.count += 1;
            if failures.count == FAILURES_MAX {
                failures.since = now;
            }
        }
        cooldown
    }

    /// Forgets what is over.
    fn forget(&mut self, now: Instant) {
        if self.forgot.is_some_and(|last| now.saturating_duration_since(last) < FORGET_INTERVAL) {
            return;
        }
        self.forgot = Some(now);
        self.peers.retain(|_, failures| !failures.is_over(now));
        self.refused.retain(|_, at| now.saturating_duration_since(*at) < REFUSED_TTL);
    }
}

impl Failures {
    fn cooldown(&self, now: Instant) -> Option<Duration> {
        let waited = now.saturating_duration_since(self.since);
        (self.count >= FAILURES_MAX).then(|| COOLDOWN.checked_sub(waited)).flatten().filter(|left| !left.is_zero())
    }

    fn is_over(&self, now: Instant) -> bool {
        let lasts = if self.count >= FAILURES_MAX { COOLDOWN } else { FAILURES_WINDOW };
        now.saturating_duration_since(self.since) >= lasts
    }
}

/// A host of IPv6 has the addresses of a /64 to itself, and counts as one.
fn network(peer: Option<IpAddr>) -> Option<IpAddr> {
    peer.map(|address| match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
        v4 => v4,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u32) -> Option<IpAddr> {
        Some(std::net::Ipv4Addr::from_bits(n).into())
    }

    #[test]
    fn five_failures_make_a_peer_wait() {
        let (mut throttle, start) = (Throttle::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        for second in 0..5 {
            assert_eq!(throttle.failed(peer(1), at(second)), None);
        }
        assert_eq!(throttle.cooldown(peer(1), at(5)), Some(COOLDOWN - Duration::from_secs(1)));
        assert!(throttle.failed(peer(1), at(5)).is_some(), "which does not begin again");
        assert_eq!((throttle.cooldown(peer(2), at(5)), throttle.cooldown(peer(1), at(4) + COOLDOWN)), (None, None));
        for second in 100..104 {
            assert_eq!(throttle.failed(peer(1), at(second)), None);
        }
        assert_eq!(throttle.failed(peer(1), at(131)), None, "the window is over");
        assert_eq!(throttle.cooldown(peer(1), at(131)), None);
    }

    #[test]
    fn many_addresses_displace_nobody_and_take_no_more_room() {
        let (mut throttle, now) = (Throttle::default(), Instant::now());
        (0..5).for_each(|_| assert_eq!(throttle.failed(peer(0), now), None));
        for n in 1..30_000 {
            throttle.failed(peer(n), now);
        }
        assert!(throttle.cooldown(peer(0), now).is_some() && throttle.peers.len() == PEERS_MAX);
        assert!(throttle.cooldown(peer(40_000), now).is_some(), "those without a record share one");
        assert_eq!(throttle.cooldown(peer(1), now), None);
        let later = now + COOLDOWN;
        throttle.failed(peer(40_000), later);
        assert!(throttle.peers.len() == 1 && throttle.cooldown(peer(40_001), later).is_none());
    }

    #[test]
    fn an_ipv6_host_is_its_network() {
        let address = |text: &str| Some(text.parse::<IpAddr>().unwrap());
        assert_eq!(network(address("2001:db8::1")), network(address("2001:db8::ffff:1")));
        assert_ne!(network(address("2001:db8::1")), network(address("2001:db8:0:1::1")));
        assert_eq!(network(address("::ffff:10.0.0.1")), address("10.0.0.1"));
    }

    #[test]
    fn wrong_credentials_are_known_for_a_moment() {
        let (mut throttle, now) = (Throttle::default(), Instant::now());
        throttle.refuse(Secret::new("key", "a"), now);
        assert!(throttle.was_refused(&Secret::new("key", "a"), now));
        assert!(!throttle.was_refused(&Secret::new("task", "a"), now));
        assert!(!throttle.was_refused(&Secret::new("key", "a"), now + REFUSED_TTL));
        (0..2 * REFUSED_MAX).for_each(|n| throttle.refuse(Secret::new("key", &n.to_string()), now));
        assert_eq!(throttle.refused.len(), REFUSED_MAX);
    }
}
