//! Digests and the algorithms of TPM banks.

use core::fmt;
use core::str::FromStr;

use ring::digest;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha1::{Digest as _, Sha1};

/// Why a text or a byte string is not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// Not 64 lower-case hex digits.
    #[error("not a SHA-256 digest: it has 64 lower-case hex digits, this text has {0} characters")]
    Text(usize),
    /// Not 32 bytes.
    #[error("a SHA-256 digest is 32 bytes, got {0}")]
    Length(usize),
    /// An algorithm name other than sha1, sha256, sha384.
    #[error("hash algorithm {0:?} is not known; sha1, sha256 and sha384 are")]
    Algorithm(String),
    /// A TPM algorithm id other than those three.
    #[error("TPM hash algorithm 0x{0:04x} is not known; sha1 (0x0004), sha256 (0x000b) and sha384 (0x000c) are")]
    AlgorithmId(u16),
}

/// A SHA-256 digest. Text form: 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sha256Digest([u8; 32]);

impl Sha256Digest {
    /// All zero: a PCR after reset, and the head of an empty log.
    pub const ZERO: Self = Self([0; 32]);

    /// The digest with these bytes.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Hashes `data`.
    #[must_use]
    pub fn of(data: &[u8]) -> Self {
        Self::of_parts(&[data])
    }

    /// Hashes the concatenation of `parts`.
    #[must_use]
    pub fn of_parts(parts: &[&[u8]]) -> Self {
        let mut context = digest::Context::new(&digest::SHA256);
        for part in parts {
            context.update(part);
        }
        let mut bytes = [0; 32];
        // ring's SHA-256 output is 32 bytes long, so that the two always pair up.
        for (to, from) in bytes.iter_mut().zip(context.finish().as_ref()) {
            *to = *from;
        }
        Self(bytes)
    }

    /// The 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<[u8; 32]> for Sha256Digest {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl AsRef<[u8]> for Sha256Digest {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl TryFrom<&[u8]> for Sha256Digest {
    type Error = DigestError;

    fn try_from(bytes: &[u8]) -> Result<Self, DigestError> {
        bytes.try_into().map(Self).map_err(|_| DigestError::Length(bytes.len()))
    }
}

impl fmt::Display for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sha256Digest({self})")
    }
}

impl FromStr for Sha256Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let bytes = lower_hex(text).ok_or(DigestError::Text(text.len()))?;
        bytes
            .as_slice()
            .try_into()
            .map_err(|_: DigestError| DigestError::Text(text.len()))
    }
}

impl Serialize for Sha256Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Sha256Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Hash algorithm of a PCR bank or a Name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// SHA-1: extended where its bank is active, never relied on.
    Sha1,
    /// SHA-256: the bank that is quoted.
    Sha256,
    /// SHA-384.
    Sha384,
}

impl Algorithm {
    /// All that are known, in the order in which records list them.
    pub const ALL: [Self; 3] = [Self::Sha1, Self::Sha256, Self::Sha384];

    /// `TPM_ALG_ID` (TPM 2.0 Part 2, section 6.3).
    #[must_use]
    pub const fn tpm_id(self) -> u16 {
        match self {
            Self::Sha1 => 0x0004,
            Self::Sha256 => 0x000B,
            Self::Sha384 => 0x000C,
        }
    }

    /// Low byte of the TPM algorithm id: the TLV type of a digest in a CEL record.
    #[must_use]
    pub const fn tlv_type(self) -> u8 {
        match self {
            Self::Sha1 => 0x04,
            Self::Sha256 => 0x0B,
            Self::Sha384 => 0x0C,
        }
    }

    /// The algorithm with this `TPM_ALG_ID`.
    ///
    /// # Errors
    /// [`DigestError::AlgorithmId`] for any other.
    pub fn from_tpm_id(id: u16) -> Result<Self, DigestError> {
        Self::ALL
            .into_iter()
            .find(|known| known.tpm_id() == id)
            .ok_or(DigestError::AlgorithmId(id))
    }

    /// Length of its digests in bytes.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::Sha1 => 20,
            Self::Sha256 => 32,
            Self::Sha384 => 48,
        }
    }

    /// `sha1`, `sha256` or `sha384`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
        }
    }

    /// Hashes `data`.
    #[must_use]
    pub fn hash(self, data: &[u8]) -> Vec<u8> {
        self.hash_parts(&[data])
    }

    /// What a PCR of this bank shows after it held `pcr` and was extended with `digest`: H(pcr || digest)
    /// (TPM 2.0 Part 1, section 17.2).
    #[must_use]
    pub fn extend(self, pcr: &[u8], digest: &[u8]) -> Vec<u8> {
        self.hash_parts(&[pcr, digest])
    }

    /// Hashes `data` with each of `algorithms`, in their order, in one pass over it.
    #[must_use]
    pub fn hash_each(algorithms: &[Self], data: &[u8]) -> Vec<Vec<u8>> {
        let mut contexts: Vec<Context> = algorithms.iter().copied().map(Context::new).collect();
        let chunk = if contexts.len() > 1 { STEP } else { data.len().max(1) };
        for part in data.chunks(chunk) {
            contexts.iter_mut().for_each(|context| context.update(part));
        }
        contexts.into_iter().map(Context::finish).collect()
    }

    fn hash_parts(self, parts: &[&[u8]]) -> Vec<u8> {
        let mut context = Context::new(self);
        parts.iter().for_each(|part| context.update(part));
        context.finish()
    }
}

/// Bytes that each of several algorithms is given in turn: a block of SHA-1's and SHA-256's. Neither waits for the other's
/// result, so that a processor with instructions for them works on both at once, as long as both are within its sight: a
/// quarter less time than for one after the other, and almost nothing from 512 bytes on.
const STEP: usize = 64;

/// A hash that is being computed.
enum Context {
    /// ring's does not use the processor's instructions for it, and is three times as slow.
    Sha1(Sha1),
    Ring(digest::Context),
}

impl Context {
    fn new(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Sha1 => Self::Sha1(Sha1::new()),
            Algorithm::Sha256 => Self::Ring(digest::Context::new(&digest::SHA256)),
            Algorithm::Sha384 => Self::Ring(digest::Context::new(&digest::SHA384)),
        }
    }

    fn update(&mut self, part: &[u8]) {
        match self {
            Self::Sha1(context) => context.update(part),
            Self::Ring(context) => context.update(part),
        }
    }

    fn finish(self) -> Vec<u8> {
        match self {
            Self::Sha1(context) => context.finalize().to_vec(),
            Self::Ring(context) => context.finish().as_ref().to_vec(),
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Algorithm {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        Self::ALL
            .into_iter()
            .find(|known| known.name() == text)
            .ok_or_else(|| DigestError::Algorithm(text.to_owned()))
    }
}

/// Decodes lower-case hex only: one value, one spelling.
pub(crate) fn lower_hex(text: &str) -> Option<Vec<u8>> {
    if text.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return None;
    }
    hex::decode(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(Sha256Digest::of(b"abc").to_string(), abc);
        assert_eq!(Sha256Digest::of_parts(&[b"a", b"bc"]).to_string(), abc);
        assert_eq!(hex::encode(Algorithm::Sha256.hash(b"abc")), abc);
        assert_eq!(
            hex::encode(Algorithm::Sha1.hash(b"abc")),
            "a9993e364706816aba3e25717850c26c9cd0d89d"
        );
        assert!(hex::encode(Algorithm::Sha384.hash(b"abc")).starts_with("cb00753f45a35e8bb5a03d699ac65007272c32ab"));
    }

    #[test]
    fn several_in_one_pass_are_each_as_alone() {
        let data: Vec<u8> = (0..300_u16).map(|at| (at % 251) as u8).collect();
        for length in [0, 1, 63, 64, 65, 127, 128, 129, 300] {
            let data = &data[..length];
            let alone = Algorithm::ALL.map(|algorithm| algorithm.hash(data));
            assert_eq!(Algorithm::hash_each(&Algorithm::ALL, data), alone, "{length} bytes");
            assert_eq!(
                Algorithm::hash_each(&[Algorithm::Sha256], data),
                [Algorithm::Sha256.hash(data)]
            );
        }
    }

    #[test]
    fn extend_is_hash_of_both() {
        let zero = [0; 32];
        let extended = Algorithm::Sha256.extend(&zero, &[1; 32]);
        let mut both = zero.to_vec();
        both.extend_from_slice(&[1; 32]);
        assert_eq!(extended, Algorithm::Sha256.hash(&both));
    }

    #[test]
    fn text_has_one_spelling() {
        let digest = Sha256Digest::of(b"x");
        let text = digest.to_string();
        assert_eq!(text.parse(), Ok(digest));
        assert_eq!(text.to_uppercase().parse::<Sha256Digest>(), Err(DigestError::Text(64)));
        assert_eq!("00".parse::<Sha256Digest>(), Err(DigestError::Text(2)));
        assert_eq!(
            serde_json::from_str::<Sha256Digest>(&format!("\"{text}\"")).unwrap(),
            digest
        );
        assert_eq!(Sha256Digest::try_from([0; 31].as_slice()), Err(DigestError::Length(31)));
    }

    #[test]
    fn algorithms_by_id_and_name() {
        for algorithm in Algorithm::ALL {
            assert_eq!(Algorithm::from_tpm_id(algorithm.tpm_id()), Ok(algorithm));
            assert_eq!(algorithm.name().parse(), Ok(algorithm));
            assert_eq!(u16::from(algorithm.tlv_type()), algorithm.tpm_id());
            assert_eq!(algorithm.hash(b"").len(), algorithm.size());
        }
        assert_eq!(Algorithm::from_tpm_id(0x12), Err(DigestError::AlgorithmId(0x12)));
        assert_eq!("md5".parse::<Algorithm>(), Err(DigestError::Algorithm("md5".into())));
    }
}
