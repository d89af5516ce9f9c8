//! What a key request does next: a state machine without input or output.
//!
//! The shell ([`super::exchange`]) carries out one [`Step`] after the other and reports each [`Outcome`]; time enters as an
//! argument. So every path through failing networks, moving PCRs and refusals is tested here without any of them.

use std::time::Duration;

/// Whole exchanges that are lost to moving PCRs before a request gives up.
const MAX_STATE_CHANGES: u32 = 5;
const FIRST_WAIT: Duration = Duration::from_millis(250);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// What the shell shall do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Open a connection to this verifier, by its place in the list.
    Connect(usize),
    /// Ask for a challenge on that connection.
    Challenge,
    /// Make a release key, certify it and quote.
    Prove,
    /// Send the evidence and receive the wrapped key.
    Release,
    /// Unwrap it with the TPM.
    Unwrap,
    /// Do nothing for so long.
    Wait(Duration),
    /// The key is here.
    Done,
    /// Give up.
    Refuse(Refusal),
}

/// How a step went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// As wanted.
    Done,
    /// The verifier was not reached, broke off, or is overloaded: worth another try.
    Unreachable(String),
    /// The verifier has no such key.
    KeyUnknown(String),
    /// The verifier refused: final.
    Refused {
        /// Its message.
        message: String,
        /// Its reasons, one by one.
        reasons: Vec<String>,
    },
    /// The challenge is no longer accepted (it expired, or was used).
    ChallengeLost,
    /// A PCR moved while the key was on its way: the exchange is void.
    StateChanged(String),
}

/// Why a key request gave up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No verifier answered before the deadline.
    #[error(
        "no verifier answered within {} s: {}; check the network and the verifier's service, then try again",
        .within.as_secs(), attempts.join("; ")
    )]
    Unreachable {
        /// The deadline.
        within: Duration,
        /// What went wrong with each verifier last.
        attempts: Vec<String>,
    },
    /// A verifier refused.
    #[error("the verifier refused: {message}")]
    Refused {
        /// Its message.
        message: String,
        /// Its reasons, one by one.
        reasons: Vec<String>,
    },
    /// Every verifier says that it has no such key.
    #[error("no verifier has this key: {}; was it made by another one, or deleted?", messages.join("; "))]
    KeyUnknown {
        /// What each verifier said.
        messages: Vec<String>,
    },
    /// The PCRs never stood still for the length of an exchange.
    #[error("the host's PCRs changed during each of {attempts} exchanges ({last}): try again when the host is quieter")]
    StateKeepsChanging {
        /// How many were tried.
        attempts: u32,
        /// What the TPM said last.
        last: String,
    },
}

/// The machine. Times are measured from its start.
#[derive(Debug)]
pub struct Machine {
    state: State,
    verifiers: Vec<Verifier>,
    current: usize,
    within: Duration,
    wait: Duration,
    state_changes: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Connecting,
    Challenging,
    Proving,
    Releasing,
    Unwrapping,
    Waiting,
    Ended,
}

#[derive(Debug)]
struct Verifier {
    name: String,
    last: Option<String>,
    key_unknown: bool,
}

impl Machine {
    /// Starts a request that asks these verifiers in turn, until `within` has passed. Gives the first step.
    #[must_use]
    pub fn start(verifiers: &[String], within: Duration) -> (Self, Step) {
        let verifiers = verifiers
            .iter()
            .map(|name| Verifier {
                name: name.clone(),
                last: None,
                key_unknown: false,
            })
            .collect();
        let mut machine = Self {
            state: State::Connecting,
            verifiers,
            current: 0,
            within,
            wait: FIRST_WAIT,
            state_changes: 0,
        };
        let step = if machine.verifiers.is_empty() {
            machine.unreachable()
        } else {
            Step::Connect(0)
        };
        (machine, step)
    }

    /// The last step ended so, at `now` after the start: what is next?
    pub fn next(&mut self, outcome: Outcome, now: Duration) -> Step {
        match outcome {
            Outcome::Done => self.forward(),
            Outcome::Unreachable(why) => self.try_another(why, now),
            Outcome::ChallengeLost => self.try_another("the challenge expired before it was answered".to_owned(), now),
            Outcome::KeyUnknown(why) => {
                if let Some(verifier) = self.verifiers.get_mut(self.current) {
                    verifier.key_unknown = true;
                }
                self.try_another(why, now)
            }
            Outcome::Refused { message, reasons } => self.refuse(Refusal::Refused { message, reasons }),
            Outcome::StateChanged(why) => self.state_changed(why, now),
        }
    }

    fn forward(&mut self) -> Step {
        let (state, step) = match self.state {
            State::Waiting => (State::Connecting, Step::Connect(self.current)),
            State::Connecting => (State::Challenging, Step::Challenge),
            State::Challenging => (State::Proving, Step::Prove),
            State::Proving => (State::Releasing, Step::Release),
            State::Releasing => (State::Unwrapping, Step::Unwrap),
            State::Unwrapping | State::Ended => (State::Ended, Step::Done),
        };
        self.state = state;
        step
    }

    /// The next verifier that may have the key; after the last one a pause, as long as the deadline allows.
    fn try_another(&mut self, why: String, now: Duration) -> Step {
        if let Some(verifier) = self.verifiers.get_mut(self.current) {
            verifier.last = Some(why);
        }
        if self.verifiers.iter().all(|verifier| verifier.key_unknown) {
            let messages = self.verifiers.iter().map(Verifier::describe).collect();
            return self.refuse(Refusal::KeyUnknown { messages });
        }
        // One that was not asked yet is asked all the same: it may be the one that answers.
        if now >= self.within && self.verifiers.iter().all(|verifier| verifier.last.is_some()) {
            return self.unreachable();
        }
        let candidate = |(place, verifier): (usize, &Verifier)| (!verifier.key_unknown).then_some(place);
        if let Some(next) = self
            .verifiers
            .iter()
            .enumerate()
            .skip(self.current.saturating_add(1))
            .find_map(candidate)
        {
            self.current = next;
            self.state = State::Connecting;
            return Step::Connect(next);
        }
        self.current = self.verifiers.iter().enumerate().find_map(candidate).unwrap_or(0);
        self.state = State::Waiting;
        let wait = self.wait.min(self.within.saturating_sub(now));
        self.wait = self.wait.saturating_mul(2).min(LONGEST_WAIT);
        Step::Wait(wait)
    }

    /// The same connection serves for another exchange: a new challenge, a new key, a new quote.
    fn state_changed(&mut self, why: String, now: Duration) -> Step {
        self.state_changes = self.state_changes.saturating_add(1);
        if self.state_changes >= MAX_STATE_CHANGES || now >= self.within {
            let attempts = self.state_changes;
            return self.refuse(Refusal::StateKeepsChanging { attempts, last: why });
        }
        self.state = State::Challenging;
        Step::Challenge
    }

    fn unreachable(&mut self) -> Step {
        let attempts = self.verifiers.iter().map(Verifier::describe).collect();
        self.refuse(Refusal::Unreachable {
            within: self.within,
            attempts,
        })
    }

    fn refuse(&mut self, refusal: Refusal) -> Step {
        self.state = State::Ended;
        Step::Refuse(refusal)
    }
}

impl Verifier {
    fn describe(&self) -> String {
        format!("{}: {}", self.name, self.last.as_deref().unwrap_or("not asked"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WITHIN: Duration = Duration::from_secs(60);
    const SOON: Duration = Duration::from_secs(1);

    fn start(count: usize) -> Machine {
        let names: Vec<String> = (0..count).map(|n| format!("https://v{n}:1")).collect();
        let (machine, step) = Machine::start(&names, WITHIN);
        assert_eq!(step, Step::Connect(0));
        machine
    }

    fn down() -> Outcome {
        Outcome::Unreachable("connection refused".into())
    }

    #[test]
    fn the_straight_way() {
        let mut machine = start(1);
        let steps: Vec<Step> = (0..5).map(|_| machine.next(Outcome::Done, SOON)).collect();
        assert_eq!(
            steps,
            [Step::Challenge, Step::Prove, Step::Release, Step::Unwrap, Step::Done]
        );
    }

    #[test]
    fn an_unreachable_verifier_is_retried_with_growing_pauses_until_the_deadline() {
        let mut machine = start(1);
        let mut now = Duration::ZERO;
        let mut waits = Vec::new();
        let refusal = loop {
            match machine.next(down(), now) {
                Step::Wait(wait) => {
                    waits.push(wait);
                    now += wait;
                    assert_eq!(machine.next(Outcome::Done, now), Step::Connect(0));
                }
                Step::Refuse(refusal) => break refusal,
                step => panic!("{step:?}"),
            }
        };
        assert_eq!(now, WITHIN, "it tries until the deadline, and no longer");
        assert!(
            waits.windows(2).rev().skip(1).all(|pair| pair[0] <= pair[1]),
            "{waits:?}"
        );
        assert!(
            matches!(&refusal, Refusal::Unreachable { attempts, .. } if attempts == &["https://v0:1: connection refused"])
        );
        assert!(refusal.to_string().contains("within 60 s"));
    }

    #[test]
    fn all_verifiers_are_tried_before_a_pause() {
        let mut machine = start(3);
        assert_eq!(machine.next(down(), SOON), Step::Connect(1));
        assert_eq!(machine.next(down(), SOON), Step::Connect(2));
        assert!(matches!(machine.next(down(), SOON), Step::Wait(_)));
        assert_eq!(machine.next(Outcome::Done, SOON), Step::Connect(0));
    }

    #[test]
    fn each_verifier_is_asked_once_however_late_it_is() {
        let mut machine = start(3);
        assert_eq!(machine.next(down(), WITHIN), Step::Connect(1));
        assert_eq!(machine.next(down(), WITHIN * 2), Step::Connect(2));
        let step = machine.next(down(), WITHIN * 3);
        assert!(matches!(step, Step::Refuse(Refusal::Unreachable { attempts, .. }) if attempts.len() == 3));
    }

    #[test]
    fn a_refusal_is_final_whoever_else_could_be_asked() {
        let mut machine = start(2);
        for _ in 0..3 {
            machine.next(Outcome::Done, SOON);
        }
        let refused = Outcome::Refused {
            message: "untrusted".into(),
            reasons: vec!["program /x".into()],
        };
        assert_eq!(
            machine.next(refused, SOON),
            Step::Refuse(Refusal::Refused {
                message: "untrusted".into(),
                reasons: vec!["program /x".into()]
            })
        );
    }

    #[test]
    fn an_unknown_key_is_asked_of_the_other_verifiers_only() {
        let mut machine = start(2);
        machine.next(Outcome::Done, SOON);
        assert_eq!(
            machine.next(Outcome::KeyUnknown("no key".into()), SOON),
            Step::Connect(1)
        );
        assert!(matches!(machine.next(down(), SOON), Step::Wait(_)));
        assert_eq!(
            machine.next(Outcome::Done, SOON),
            Step::Connect(1),
            "v0 is not asked again"
        );
        machine.next(Outcome::Done, SOON);
        let step = machine.next(Outcome::KeyUnknown("none here".into()), SOON);
        assert!(matches!(step, Step::Refuse(Refusal::KeyUnknown { messages }) if messages.len() == 2));
    }

    #[test]
    fn a_moving_state_starts_the_exchange_anew_on_the_same_connection_a_few_times() {
        let mut machine = start(1);
        let mut changes = 0;
        let last = loop {
            // Up to the TPM's unwrap, where the policy session notices.
            while machine.next(Outcome::Done, SOON) != Step::Unwrap {}
            changes += 1;
            match machine.next(Outcome::StateChanged("PCR 10 moved".into()), SOON) {
                Step::Challenge => {}
                step => break step,
            }
        };
        assert_eq!(changes, 5);
        assert!(matches!(
            last,
            Step::Refuse(Refusal::StateKeepsChanging { attempts: 5, .. })
        ));
    }

    #[test]
    fn a_lost_challenge_is_asked_for_again() {
        let mut machine = start(1);
        while machine.next(Outcome::Done, SOON) != Step::Release {}
        assert!(matches!(machine.next(Outcome::ChallengeLost, SOON), Step::Wait(_)));
        assert_eq!(machine.next(Outcome::Done, SOON), Step::Connect(0));
    }

    #[test]
    fn nobody_to_ask_is_a_refusal() {
        let (_, step) = Machine::start(&[], WITHIN);
        assert!(matches!(step, Step::Refuse(Refusal::Unreachable { .. })));
    }
}
