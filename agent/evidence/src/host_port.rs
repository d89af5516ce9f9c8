//! Host and port of a service, as join files, tokens and configurations name it: `HOST[:PORT]`, the part of a URL that RFC 3986,
//! section 3.2 calls its authority.

use core::fmt;
use core::num::NonZeroU16;
use std::net::{IpAddr, Ipv6Addr};

/// Why a text is not host and port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.why())]
pub enum HostPortError {
    /// A user stands before the host, perhaps with a password.
    User,
    /// The host is empty.
    NoHost,
    /// Brackets are for IPv6 addresses alone.
    Brackets,
    /// The port is missing, and there is no usual one.
    NoPort,
    /// The port is none.
    Port,
}

impl HostPortError {
    /// What is wrong with it, to be said behind the URL.
    #[must_use]
    pub const fn why(self) -> &'static str {
        match self {
            Self::User => "it has a user or a password in it",
            Self::NoHost => "it names no host",
            Self::Brackets => "the address in brackets is not IPv6",
            Self::NoPort => "it names no port",
            Self::Port => "its port is not a number from 1 to 65535",
        }
    }
}

/// A service's host and TCP port. Its text form has both, as a request's `Host` does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort {
    /// Without brackets.
    host: String,
    port: u16,
}

impl HostPort {
    /// Takes the text apart; `usual` is the port where none is named. What a name may be made of is left to whoever resolves it.
    ///
    /// # Errors
    /// Each [`HostPortError`].
    pub fn parse(text: &str, usual: Option<u16>) -> Result<Self, HostPortError> {
        if text.contains('@') {
            return Err(HostPortError::User);
        }
        // An IPv6 address is written in brackets, which are no part of it.
        let (host, rest) = match text.strip_prefix('[') {
            Some(text) => text
                .split_once(']')
                .filter(|(ip, _)| ip.parse::<Ipv6Addr>().is_ok())
                .ok_or(HostPortError::Brackets)?,
            None => text.split_at(text.find(':').unwrap_or(text.len())),
        };
        if host.is_empty() {
            return Err(HostPortError::NoHost);
        }
        let port = match rest.strip_prefix(':') {
            Some(port) => port.parse().map_err(|_| HostPortError::Port).map(NonZeroU16::get)?,
            None if rest.is_empty() => usual.ok_or(HostPortError::NoPort)?,
            None => return Err(HostPortError::Port),
        };
        Ok(Self {
            host: host.to_owned(),
            port,
        })
    }

    /// DNS name, or IP address without brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// TCP port.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// The host as an IP address, if it is one.
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ip() {
            Some(IpAddr::V6(ip)) => write!(f, "[{ip}]:{}", self.port),
            _ => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_and_port_are_taken_apart_and_put_together_again() {
        for (text, host, port, shown) in [
            ("bao.example:8200", "bao.example", 8200, "bao.example:8200"),
            ("bao.example", "bao.example", 443, "bao.example:443"),
            ("192.0.2.1:1", "192.0.2.1", 1, "192.0.2.1:1"),
            ("[2001:DB8::1]:65535", "2001:DB8::1", 65535, "[2001:db8::1]:65535"),
            ("[::1]", "::1", 443, "[::1]:443"),
        ] {
            let parsed = HostPort::parse(text, Some(443)).unwrap();
            assert_eq!(
                (parsed.host(), parsed.port(), parsed.to_string().as_str()),
                (host, port, shown)
            );
            assert_eq!(HostPort::parse(shown, None).unwrap().to_string(), shown);
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for (text, error) in [
            ("user@a:1", HostPortError::User),
            ("", HostPortError::NoHost),
            (":1", HostPortError::NoHost),
            ("[]:1", HostPortError::Brackets),
            ("[::1", HostPortError::Brackets),
            ("[a]:1", HostPortError::Brackets),
            ("[192.0.2.1]:1", HostPortError::Brackets),
            ("a", HostPortError::NoPort),
            ("[::1]", HostPortError::NoPort),
            ("a:", HostPortError::Port),
            ("a:0", HostPortError::Port),
            ("a:65536", HostPortError::Port),
            ("a:1:2", HostPortError::Port),
            ("::1", HostPortError::NoHost),
            ("[::1]1", HostPortError::Port),
            ("[::1]x:1", HostPortError::Port),
        ] {
            assert_eq!(HostPort::parse(text, None), Err(error), "{text:?}");
        }
    }
}
