//! The token of a login, kept while it lives.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use super::exchange::Auth;

/// Longest token: a batch token has some hundred bytes.
const MAX_TOKEN: usize = 8 * 1024;

/// A token.
#[derive(Clone)]
pub(super) struct Token {
    text: Arc<Zeroizing<String>>,
    got: Instant,
    /// `None`: it does not run out.
    lives: Option<Duration>,
    renewable: bool,
}

impl Token {
    pub fn expose(&self) -> &str {
        &self.text
    }

    /// Once half of its time is over.
    pub fn is_to_be_renewed(&self) -> bool {
        self.renewable && self.lives.is_some_and(|lives| self.got.elapsed() > lives / 2)
    }

    fn lives(&self) -> bool {
        self.lives.is_none_or(|lives| self.got.elapsed() < lives)
    }
}

/// The one that is in use.
#[derive(Default)]
pub(super) struct Tokens(Mutex<Option<Token>>);

impl Tokens {
    /// The token, if it has not run out.
    pub fn living(&self) -> Option<Token> {
        self.lock().clone().filter(Token::lives)
    }

    /// Keeps a new one instead; `None` when it can't be one.
    pub fn keep(&self, auth: Auth) -> Option<Token> {
        let text = auth.client_token.0;
        if text.is_empty() || text.len() > MAX_TOKEN {
            return None;
        }
        let token = Token {
            text: Arc::new(text),
            got: Instant::now(),
            lives: (auth.lease_duration > 0).then(|| Duration::from_secs(auth.lease_duration)),
            renewable: auth.renewable,
        };
        *self.lock() = Some(token.clone());
        Some(token)
    }

    /// Forgets this one, unless somebody has a newer one already.
    pub fn forget(&self, token: &Token) {
        let mut kept = self.lock();
        if kept.as_ref().is_some_and(|kept| Arc::ptr_eq(&kept.text, &token.text)) {
            *kept = None;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Token>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
