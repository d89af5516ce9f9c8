//! Enrolment: the one moment in which it is decided which TPM, attestation key and TLS key a host name stands for.
//!
//! The chain of proof, all on one connection: the EK is one that the operator trusts; the TPM that holds it also holds
//! the AK (credential activation); that AK signs a quote over a fresh nonce and this connection's exporter, so the AK's
//! host is the end of this connection, whose TLS key is pinned with it. Nothing re-enrols itself: a known name or
//! identity is refused until the operator removes the old host.

use std::time::Duration;

use assay_evidence::credential::{CredentialError, make_credential};
use assay_evidence::ek::{EkError, EkTrust, TrustedEk};
use assay_evidence::pcr::RuntimePcr;
use assay_evidence::tpm::{AkError, AttestationKey};
use assay_evidence::wire::{ActivateRequest, B64};
use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::client::{Agent, Asker, ClientError, Pin};
use crate::judge::{Evidence, LookError};
use crate::pki::sha256;
use crate::store::{NewHost, Store, StoreError};

/// Why a host was not enrolled.
#[derive(Debug, Error)]
pub enum EnrolError {
    /// The agent cannot be asked.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The name or one of the identities is in use.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The agent speaks another version.
    #[error("the agent's identity has version {0}, this verifier knows version 1: update the older of the two")]
    Version(u32),
    /// The operator's trust does not cover this endorsement key.
    #[error("the TPM's endorsement key (sha256 {}) is not trusted", hex::encode(.ek_sha256))]
    EkTrust {
        /// The key found.
        ek_sha256: [u8; 32],
        /// What is missing.
        #[source]
        cause: Box<EkError>,
    },
    /// The attestation key could sign things that the TPM did not make, or leave the TPM.
    #[error("the agent's attestation key is refused")]
    Ak(#[source] AkError),
    /// No random numbers.
    #[error("the system gives no random numbers")]
    Random,
    /// No credential could be made for this endorsement key.
    #[error("no credential can be made for the TPM's endorsement key")]
    Credential(#[source] CredentialError),
    /// The agent's TPM refused to open the credential.
    #[error(
        "the agent cannot activate the credential: the TPM with this endorsement key does not hold the attestation key that the agent shows"
    )]
    Activation(#[source] ClientError),
    /// The agent answered with another secret.
    #[error(
        "the agent returned a wrong secret: the TPM with this endorsement key does not hold the attestation key that the agent shows"
    )]
    WrongSecret,
    /// The attestation key does not answer for this connection.
    #[error("the attestation key does not vouch for this connection")]
    Quote(#[source] LookError),
}

/// Proves a host's identities and pins them. Nothing is stored unless everything was proved.
pub async fn enrol(store: &Store, asker: &Asker, request: &Request, timeout: Duration) -> Result<NewHost, EnrolError> {
    let name = request.name.clone();
    store.run(move |s| s.check_new_host(&name)).await?;
    let mut agent = asker.connect(&request.address, Pin::FirstContact, timeout).await?;
    let identity = agent.identity().await?;
    if identity.version != 1 {
        return Err(EnrolError::Version(identity.version));
    }
    let ek_sha256 = sha256(identity.ek_public.as_ref());
    let ek = request
        .trust
        .check(&identity, crate::time::now())
        .map_err(|cause| EnrolError::EkTrust {
            ek_sha256,
            cause: Box::new(cause),
        })?;
    let ak = AttestationKey::new(identity.ak_public.as_ref()).map_err(EnrolError::Ak)?;
    activate(&mut agent, &ek, &ak).await?;
    let evidence = Evidence::ask_first(&mut agent).await.map_err(EnrolError::Quote)?;
    evidence.verify(&ak).map_err(EnrolError::Quote)?;

    let host = NewHost {
        name: request.name.clone(),
        address: request.address.clone(),
        ek_sha256,
        ek_public: identity.ek_public.0,
        ek_certificate: identity.ek_certificate.map(|c| c.0),
        ak_public: identity.ak_public.0,
        ak_name: ak.name().as_bytes().to_vec(),
        tls_spki_sha256: agent.spki_sha256(),
        pcr: request.pcr,
        policy: request.policy.clone(),
    };
    let row = host.clone();
    store.run(move |s| s.add_host(&row)).await?;
    Ok(host)
}

/// What the operator says about a new host.
pub struct Request {
    /// Its name.
    pub name: String,
    /// `HOST:PORT` of its agent.
    pub address: String,
    /// Which endorsement key it may have.
    pub trust: EkTrust,
    /// The PCR that its runtime log must be in.
    pub pcr: RuntimePcr,
    /// The policy that will judge it.
    pub policy: String,
}

/// Has the TPM show that it holds both keys (TPM 2.0 part 1, credential protection).
async fn activate(agent: &mut Agent, ek: &TrustedEk, ak: &AttestationKey) -> Result<(), EnrolError> {
    let mut secret = Zeroizing::new([0_u8; 32]);
    SystemRandom::new()
        .fill(secret.as_mut())
        .map_err(|_| EnrolError::Random)?;
    let credential = make_credential(ek.public(), ak.name(), secret.as_ref()).map_err(EnrolError::Credential)?;
    let request = ActivateRequest {
        credential_blob: B64(credential.blob),
        secret: B64(credential.encrypted_secret),
    };
    let answer = agent.activate(&request).await.map_err(|e| match e {
        refused @ ClientError::Refused(_) => EnrolError::Activation(refused),
        other => EnrolError::Client(other),
    })?;
    // Under a key of the moment, so that the comparison's time does not tell how much of a guess was right.
    let key = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new()).map_err(|_| EnrolError::Random)?;
    hmac::verify(&key, answer.secret.as_ref(), hmac::sign(&key, secret.as_ref()).as_ref())
        .map_err(|_| EnrolError::WrongSecret)
}
