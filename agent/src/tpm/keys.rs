//! Endorsement key, what identifies the TPM, and the credential that ties endorsement and attestation key together.

use tss_esapi::attributes::SessionAttributesBuilder;
use tss_esapi::constants::{PropertyTag, SessionType};
use tss_esapi::handles::{AuthHandle, KeyHandle, PersistentTpmHandle, SessionHandle, TpmHandle};
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::session_handles::{AuthSession, PolicySession};
use tss_esapi::structures::{Digest, EncryptedSecret, IdObject, Nonce, Public, SymmetricDefinition};
use tss_esapi::traits::Marshall as _;
use zeroize::Zeroizing;

use super::ak::{self, Ak};
use super::device::Device;
use super::ek::{self, Ek};
use super::{Identity, TpmConfig, TpmError, nv};

/// The keys in the TPM, and what to tell others about them and the TPM.
pub(super) struct Keys {
    pub ak: KeyHandle,
    ek: Ek,
    pub identity: Identity,
}

/// Finds or makes the keys.
pub(super) fn set_up(device: &mut Device, config: &TpmConfig) -> Result<Keys, TpmError> {
    let kind = ek::choose(device, config.ek)?;
    let ek = Ek::find_or_make(device, kind)?;
    identify(device, ek, config)
}

/// The same keys through a new connection.
///
/// # Errors
/// [`TpmError::ForeignKey`] when another attestation key is there now, and any other.
pub(super) fn find_again(device: &mut Device, keys: &mut Keys, ak_handle: u32) -> Result<(), TpmError> {
    let foreign = |handle| TpmError::ForeignKey { handle };
    let (ak, public) = persistent_key(device, ak_handle)?.ok_or_else(|| foreign(ak_handle))?;
    if marshal_public(&public)? != keys.identity.ak_public {
        return Err(foreign(ak_handle));
    }
    keys.ek.find_again(device)?;
    keys.ak = ak;
    Ok(())
}

fn identify(device: &mut Device, ek: Ek, config: &TpmConfig) -> Result<Keys, TpmError> {
    let Ak {
        handle: ak,
        public: ak_public,
        replaced: ak_replaced,
    } = ak::find_or_make(device, config.ak_handle, config.ak)?;
    let manufacturer = device.property(PropertyTag::Manufacturer)?.to_be_bytes();
    let firmware = (
        device.property(PropertyTag::FirmwareVersion1)?,
        device.property(PropertyTag::FirmwareVersion2)?,
    );
    let identity = Identity {
        ek_public: marshal_public(&ek.public)?,
        ek_kind: ek.kind,
        ek_certificate: nv::ek_certificate(device, ek.kind)?,
        ak_public: marshal_public(&ak_public)?,
        ak_kind: config.ak,
        ak_replaced,
        manufacturer: String::from_utf8_lossy(&manufacturer)
            .trim_end_matches(['\0', ' '])
            .to_owned(),
        firmware: format!("{:08x}.{:08x}", firmware.0, firmware.1),
        banks: device.log_banks(),
    };
    Ok(Keys { ak, ek, identity })
}

/// TPM2_ActivateCredential: the secret that a verifier encrypted to this endorsement key under the attestation key's Name.
pub(super) fn activate(
    device: &mut Device,
    keys: &Keys,
    credential_blob: &[u8],
    encrypted_secret: &[u8],
) -> Result<Zeroizing<Vec<u8>>, TpmError> {
    const OPERATION: &str = "TPM2_ActivateCredential";
    let malformed = |what| TpmError::Nonsense {
        operation: OPERATION,
        what,
    };
    let blob = sized(credential_blob).and_then(|blob| IdObject::try_from(blob.to_vec()).ok());
    let blob = blob.ok_or_else(|| malformed("the credential is no TPM2B_ID_OBJECT"))?;
    let secret = sized(encrypted_secret).and_then(|secret| EncryptedSecret::try_from(secret.to_vec()).ok());
    let secret = secret.ok_or_else(|| malformed("the secret is no TPM2B_ENCRYPTED_SECRET"))?;

    keys.ek
        .with(device, |device, ek| activate_with(device, keys.ak, ek, &blob, &secret))
}

fn activate_with(
    device: &mut Device,
    ak: KeyHandle,
    ek: KeyHandle,
    blob: &IdObject,
    secret: &EncryptedSecret,
) -> Result<Zeroizing<Vec<u8>>, TpmError> {
    // The first session authorises the attestation key and brings the secret back encrypted: a salt to the endorsement key
    // keeps whoever listens on the bus from it. The second satisfies the endorsement key's policy.
    let answer = Session::start(device, SessionType::Hmac, Some(ek))?;
    let result = activate_in(device, &answer, ak, ek, blob, secret);
    answer.end(device);
    result
}

fn activate_in(
    device: &mut Device,
    answer: &Session,
    ak: KeyHandle,
    ek: KeyHandle,
    blob: &IdObject,
    secret: &EncryptedSecret,
) -> Result<Zeroizing<Vec<u8>>, TpmError> {
    let policy = Session::start(device, SessionType::Policy, None)?;
    let result = endorsement_policy(device, &policy).and_then(|()| {
        let sessions = (Some(answer.0), Some(policy.0), None);
        device.run("TPM2_ActivateCredential", |context| {
            context.execute_with_sessions(sessions, |context| {
                context.activate_credential(ak, ek, blob.clone(), secret.clone())
            })
        })
    });
    policy.end(device);
    result.map(|secret| Zeroizing::new(secret.value().to_vec()))
}

/// PolicySecret(TPM_RH_ENDORSEMENT), what every L template asks for.
fn endorsement_policy(device: &mut Device, session: &Session) -> Result<(), TpmError> {
    let policy = session.policy()?;
    device.run_authorised("TPM2_PolicySecret", |context| {
        context.policy_secret(
            policy,
            AuthHandle::Endorsement,
            Nonce::default(),
            Digest::default(),
            Nonce::default(),
            None,
        )
    })?;
    Ok(())
}

/// A session of which parameters cross the bus encrypted (AES-128-CFB).
pub(super) struct Session(pub AuthSession);

impl Session {
    /// Starts a session; with `salt` its keys come from a secret that only the TPM holding this key can know.
    pub(super) fn start(device: &mut Device, kind: SessionType, salt: Option<KeyHandle>) -> Result<Self, TpmError> {
        const OPERATION: &str = "TPM2_StartAuthSession";
        let started = device.run(OPERATION, |context| {
            let symmetric = SymmetricDefinition::AES_128_CFB;
            context.start_auth_session(salt, None, None, kind, symmetric, HashingAlgorithm::Sha256)
        })?;
        let session = Self(started.ok_or(TpmError::Nonsense {
            operation: OPERATION,
            what: "there is no session",
        })?);
        let salted = salt.is_some();
        let (attributes, mask) = SessionAttributesBuilder::new()
            .with_continue_session(true)
            .with_decrypt(salted)
            .with_encrypt(salted)
            .build();
        device.run(OPERATION, |context| {
            context.tr_sess_set_attributes(session.0, attributes, mask)
        })?;
        Ok(session)
    }

    /// This session, as a policy session.
    pub(super) fn policy(&self) -> Result<PolicySession, TpmError> {
        PolicySession::try_from(self.0).map_err(|source| TpmError::Refused {
            operation: "policy session",
            source,
        })
    }

    /// Frees it.
    pub(super) fn end(self, device: &mut Device) {
        device.flush(SessionHandle::from(self.0).into());
    }
}

/// The key at a persistent handle, if there is one.
pub(super) fn persistent_key(device: &mut Device, handle: u32) -> Result<Option<(KeyHandle, Public)>, TpmError> {
    let persistent = persistent_handle(handle)?;
    if !device.has_handle(handle)? {
        return Ok(None);
    }
    let object = device.run("TPM2_ReadPublic", |context| {
        context.tr_from_tpm_public(TpmHandle::Persistent(persistent))
    })?;
    let key = KeyHandle::from(object);
    let (public, _, _) = device.run("TPM2_ReadPublic", |context| context.read_public(key))?;
    Ok(Some((key, public)))
}

pub(super) fn persistent_handle(handle: u32) -> Result<PersistentTpmHandle, TpmError> {
    // Owner handles are the lower half; the upper one is the platform's (TPM 2.0 Part 2, 7.5).
    if !(0x8100_0000..=0x817f_ffff).contains(&handle) {
        return Err(TpmError::BadHandle { handle });
    }
    PersistentTpmHandle::new(handle).map_err(|_| TpmError::BadHandle { handle })
}

/// Whether `found` is a key of this template: everything equal but the public key itself.
pub(super) fn same_template(found: &Public, template: &Public) -> bool {
    match (found.clone(), template.clone()) {
        (
            Public::Rsa {
                object_attributes,
                name_hashing_algorithm,
                auth_policy,
                parameters,
                ..
            },
            Public::Rsa { unique, .. },
        ) => {
            Public::Rsa {
                object_attributes,
                name_hashing_algorithm,
                auth_policy,
                parameters,
                unique,
            } == *template
        }
        (
            Public::Ecc {
                object_attributes,
                name_hashing_algorithm,
                auth_policy,
                parameters,
                ..
            },
            Public::Ecc { unique, .. },
        ) => {
            Public::Ecc {
                object_attributes,
                name_hashing_algorithm,
                auth_policy,
                parameters,
                unique,
            } == *template
        }
        _ => false,
    }
}

/// TPMT_PUBLIC.
pub(super) fn marshal_public(public: &Public) -> Result<Vec<u8>, TpmError> {
    public.marshall().map_err(|source| TpmError::Refused {
        operation: "marshal a public area",
        source,
    })
}

/// The contents of a TPM2B: exactly as many bytes as its size says.
fn sized(bytes: &[u8]) -> Option<&[u8]> {
    let (size, contents) = bytes.split_first_chunk::<2>()?;
    (contents.len() == usize::from(u16::from_be_bytes(*size))).then_some(contents)
}
