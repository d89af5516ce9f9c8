//! Nonces that were given out for key requests and not used yet.
//!
//! A nonce is good for one try, on the connection that asked for it, for one host, key and disk, for thirty seconds.
//! They live in memory only: a restart forgets them all, which costs a host one more request.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use assay_evidence::binding::Nonce;
use assay_evidence::replay::HeldLog;
use thiserror::Error;

/// How long a nonce is good for.
pub const LIFETIME: Duration = Duration::from_secs(30);

/// What a nonce was given out for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Purpose {
    /// Number of the connection that asked; the host is the one behind it.
    pub connection: u64,
    /// The key, as its id is written.
    pub key_id: String,
    /// LUKS UUID of the disk.
    pub disk: [u8; 16],
}

/// An open question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Challenge {
    /// What the evidence must carry.
    pub nonce: Nonce,
    /// What was held of the host when it was asked, the log's bytes aside: a poll can move that on before the answer
    /// comes, and the answer goes on from here.
    pub held: HeldLog,
    /// Bytes of the log that were held.
    pub length: usize,
}

/// Why there is no nonce.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ChallengeError {
    /// None was given out for this, or it was used.
    #[error(
        "no challenge is open for this key and disk on this connection: ask for one first; each is good for one request"
    )]
    None,
    /// It is older than [`LIFETIME`].
    #[error("the challenge is older than {} s: ask for a new one", LIFETIME.as_secs())]
    Expired,
    /// Too many are open.
    #[error("too many challenges are open: use them, or wait {} s", LIFETIME.as_secs())]
    TooMany,
}

/// The open nonces.
#[derive(Default)]
pub struct Challenges(HashMap<Purpose, (Challenge, Instant)>);

impl Challenges {
    /// Notes a question; one that was open for the same purpose is forgotten.
    pub fn open(&mut self, purpose: Purpose, challenge: Challenge, now: Instant) -> Result<(), ChallengeError> {
        self.0
            .retain(|_, (_, since)| now.saturating_duration_since(*since) <= LIFETIME);
        let of_this_connection = self.0.keys().filter(|p| p.connection == purpose.connection).count();
        if !self.0.contains_key(&purpose) && (self.0.len() >= MAX_OPEN || of_this_connection >= MAX_OPEN_HERE) {
            return Err(ChallengeError::TooMany);
        }
        self.0.insert(purpose, (challenge, now));
        Ok(())
    }

    /// Takes the nonce for a purpose; whatever comes of it, it is used up.
    pub fn take(&mut self, purpose: &Purpose, now: Instant) -> Result<Challenge, ChallengeError> {
        let (challenge, since) = self.0.remove(purpose).ok_or(ChallengeError::None)?;
        if now.saturating_duration_since(since) > LIFETIME {
            Err(ChallengeError::Expired)
        } else {
            Ok(challenge)
        }
    }

    /// Forgets what a closed connection left open.
    pub fn close(&mut self, connection: u64) {
        self.0.retain(|purpose, _| purpose.connection != connection);
    }
}

/// Open nonces in all, and on one connection.
const MAX_OPEN: usize = 4096;
const MAX_OPEN_HERE: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    fn purpose(connection: u64, key_id: &str) -> Purpose {
        Purpose {
            connection,
            key_id: key_id.to_owned(),
            disk: [7; 16],
        }
    }

    fn challenge(byte: u8) -> Challenge {
        Challenge {
            nonce: Nonce::new([byte; 32]),
            held: HeldLog::none(),
            length: 0,
        }
    }

    #[test]
    fn a_nonce_is_good_once() {
        let (mut open, now) = (Challenges::default(), Instant::now());
        open.open(purpose(1, "k"), challenge(1), now).unwrap();
        assert_eq!(open.take(&purpose(1, "k"), now), Ok(challenge(1)));
        assert_eq!(open.take(&purpose(1, "k"), now), Err(ChallengeError::None));
    }

    #[test]
    fn a_nonce_is_good_for_thirty_seconds() {
        let (mut open, now) = (Challenges::default(), Instant::now());
        open.open(purpose(1, "k"), challenge(1), now).unwrap();
        assert_eq!(
            open.take(&purpose(1, "k"), now + LIFETIME + Duration::from_millis(1)),
            Err(ChallengeError::Expired)
        );
        assert_eq!(
            open.take(&purpose(1, "k"), now),
            Err(ChallengeError::None),
            "an expired nonce is used up, too"
        );
    }

    #[test]
    fn a_nonce_is_for_one_connection_key_and_disk() {
        let (mut open, now) = (Challenges::default(), Instant::now());
        open.open(purpose(1, "k"), challenge(1), now).unwrap();
        assert_eq!(open.take(&purpose(2, "k"), now), Err(ChallengeError::None));
        assert_eq!(open.take(&purpose(1, "l"), now), Err(ChallengeError::None));
        assert_eq!(
            open.take(
                &Purpose {
                    disk: [8; 16],
                    ..purpose(1, "k")
                },
                now
            ),
            Err(ChallengeError::None)
        );
        open.close(1);
        assert_eq!(open.take(&purpose(1, "k"), now), Err(ChallengeError::None));
    }

    #[test]
    fn a_connection_has_few_and_expired_ones_make_room() {
        let (mut open, now) = (Challenges::default(), Instant::now());
        for n in 0..MAX_OPEN_HERE {
            open.open(purpose(1, &n.to_string()), challenge(1), now).unwrap();
        }
        assert_eq!(
            open.open(purpose(1, "more"), challenge(1), now),
            Err(ChallengeError::TooMany)
        );
        open.open(purpose(1, "0"), challenge(2), now).unwrap();
        open.open(purpose(2, "more"), challenge(1), now).unwrap();
        open.open(purpose(1, "more"), challenge(1), now + LIFETIME * 2).unwrap();
    }
}
