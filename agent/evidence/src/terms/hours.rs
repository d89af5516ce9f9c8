//! Hours of the week, in UTC: `mon-fri 08:00-18:00`.

use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
const DAY_S: u64 = 86_400;
/// 1970-01-01 was a Thursday.
const FIRST_DAY: u64 = 3;
const DAY_MIN: u16 = 24 * 60;

/// The same hours of some days in a row, in UTC. Text form: `mon-fri 08:00-18:00`; the end does not belong to it, and may be
/// `24:00`. What goes over midnight, or over Sunday, is written as two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hours {
    /// Monday is 0.
    first_day: u8,
    last_day: u8,
    /// In minutes.
    from: u16,
    to: u16,
}

/// A text that is no hours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} are no hours of a week: write them as \"mon-fri 08:00-18:00\" or \"sat 00:00-24:00\" (UTC)")]
pub struct HoursError(String);

impl Hours {
    /// Whether this Unix time is among them.
    #[must_use]
    pub fn include(&self, unix: u64) -> bool {
        let day = (unix / DAY_S).saturating_add(FIRST_DAY) % 7;
        let minute = unix % DAY_S / 60;
        (u64::from(self.first_day)..=u64::from(self.last_day)).contains(&day)
            && (u64::from(self.from)..u64::from(self.to)).contains(&minute)
    }

    fn parse(text: &str) -> Option<Self> {
        let (days, times) = text.split_once(' ')?;
        let day = |name: &str| {
            let place = DAYS.iter().position(|day| *day == name)?;
            u8::try_from(place).ok()
        };
        let (first, last) = days.split_once('-').unwrap_or((days, days));
        let (first_day, last_day) = (day(first)?, day(last)?);
        let (from, to) = times.split_once('-')?;
        let (from, to) = (minute(from)?, minute(to)?);
        (first_day <= last_day && from < to && to <= DAY_MIN).then_some(Self {
            first_day,
            last_day,
            from,
            to,
        })
    }
}

/// `HH:MM`, in minutes.
fn minute(text: &str) -> Option<u16> {
    let (hour, minute) = text.split_once(':')?;
    let number = |text: &str| {
        let digits = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse::<u16>().ok()).flatten()
    };
    let (hour, minute) = (number(hour)?, number(minute)?);
    (hour <= 24 && minute < 60).then(|| hour * 60 + minute)
}

impl FromStr for Hours {
    type Err = HoursError;

    fn from_str(text: &str) -> Result<Self, HoursError> {
        Self::parse(text).ok_or_else(|| HoursError(text.chars().take(40).collect()))
    }
}

impl fmt::Display for Hours {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |day: u8| DAYS.get(usize::from(day)).copied().unwrap_or_default();
        f.write_str(name(self.first_day))?;
        if self.last_day != self.first_day {
            write!(f, "-{}", name(self.last_day))?;
        }
        let clock = |minute: u16| (minute / 60, minute % 60);
        let ((a, b), (c, d)) = (clock(self.from), clock(self.to));
        write!(f, " {a:02}:{b:02}-{c:02}:{d:02}")
    }
}

impl Serialize for Hours {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hours {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}
