//! A verifier's address, as join files and LUKS2 tokens write it: `https://HOST[:PORT]`, nothing else.

use assay_evidence::host_port::HostPort;
use rustls::pki_types::ServerName;

/// Why an address is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{url:?} is not a verifier's address: {reason}; write https://HOST:PORT")]
pub struct UrlError {
    /// The text, cut to a printable length.
    pub url: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

/// An address that was taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifierUrl {
    address: HostPort,
    name: ServerName<'static>,
}

impl VerifierUrl {
    /// Takes an address apart.
    ///
    /// # Errors
    /// [`UrlError`] for anything but scheme https, a host name or address, and perhaps a port.
    pub fn parse(url: &str) -> Result<Self, UrlError> {
        let refuse = |reason| UrlError {
            url: url.chars().take(100).collect(),
            reason,
        };
        let uri: hyper::Uri = url.parse().map_err(|_| refuse("it is not a URL"))?;
        if uri.scheme_str() != Some("https") {
            return Err(refuse("the scheme is not https"));
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(refuse("it has a path"));
        }
        let authority = uri.authority().ok_or_else(|| refuse("it has no host"))?;
        // The reader of URLs would pass over a port that is out of range.
        let address = HostPort::parse(authority.as_str(), Some(443)).map_err(|error| refuse(error.why()))?;
        let name = ServerName::try_from(address.host().to_owned())
            .map_err(|_| refuse("its host is neither a name nor an address"))?;
        Ok(Self { address, name })
    }

    /// Where it is. As text, the value of the HTTP Host header.
    #[must_use]
    pub fn address(&self) -> &HostPort {
        &self.address
    }

    /// The name that the server's certificate must have.
    #[must_use]
    pub fn server_name(&self) -> ServerName<'static> {
        self.name.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_apart() {
        let url = VerifierUrl::parse("https://verifier.example:8444").unwrap();
        assert_eq!(url.address().to_string(), "verifier.example:8444");
        let url = VerifierUrl::parse("https://[2001:db8::1]:8444/").unwrap();
        assert_eq!(url.address().to_string(), "[2001:db8::1]:8444");
        let is_v6 = |name| matches!(name, ServerName::IpAddress(rustls::pki_types::IpAddr::V6(_)));
        assert!(is_v6(url.server_name()));
        assert_eq!(VerifierUrl::parse("https://192.0.2.1").unwrap().address().port(), 443);
    }

    #[test]
    fn anything_else_is_refused() {
        for url in [
            "",
            "verifier.example",
            "http://verifier.example",
            "https://",
            "https://verifier.example/path",
            "https://verifier.example/?q",
            "https://user@verifier.example",
            "https://verifier.example:0",
            "https://verifier.example:99999",
            "https://bad_.-name-:1",
        ] {
            assert!(VerifierUrl::parse(url).is_err(), "{url}");
        }
    }
}
