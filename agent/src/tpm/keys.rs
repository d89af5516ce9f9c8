//! Endorsement key, what identifies the TPM, and the credential that ties endorsement and attestation key together.

use tss_esapi::Context;
use tss_esapi::abstraction::{AsymmetricAlgorithmSelection, DefaultKey, ek, nv};
use tss_esapi::attributes::SessionAttributesBuilder;
use tss_esapi::constants::{PropertyTag, SessionType};
use tss_esapi::handles::{AuthHandle, KeyHandle, NvIndexTpmHandle, PersistentTpmHandle, SessionHandle, TpmHandle};
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::key_bits::RsaKeyBits;
use tss_esapi::interface_types::resource_handles::{Hierarchy, NvAuth};
use tss_esapi::interface_types::session_handles::{AuthSession, PolicySession};
use tss_esapi::structures::{Digest, EncryptedSecret, IdObject, Nonce, Public, SymmetricDefinition};
use tss_esapi::traits::Marshall as _;
use tss_esapi::utils::TpmsContext;
use zeroize::Zeroizing;

use super::ak::{self, Ak};
use super::device::Device;
use super::{AkKind, Identity, TpmError};

/// Where TCG's provisioning guidance keeps an RSA-2048 endorsement key.
const EK_HANDLE: u32 = 0x8101_0001;

/// NV index of its certificate (TCG EK Credential Profile, 2.2.1.4 low range).
const EK_CERTIFICATE: u32 = 0x01c0_0002;

/// Certificates are 1 to 2 KiB; makers pad, but not beyond this.
const EK_CERTIFICATE_MAX: usize = 8 * 1024;

/// The keys in the TPM, and what to tell others about them and the TPM.
pub(super) struct Keys {
    pub ak: KeyHandle,
    ek: Endorsement,
    pub identity: Identity,
}

/// Finds or makes the keys.
pub(super) fn set_up(device: &mut Device, ak_handle: u32, kind: AkKind) -> Result<Keys, TpmError> {
    let (ek, ek_public) = Endorsement::find_or_make(device)?;
    identify(device, ek, &ek_public, ak_handle, kind)
}

/// The same keys through a new connection.
///
/// # Errors
/// [`TpmError::ForeignKey`] when another key is there now, and any other.
pub(super) fn find_again(device: &mut Device, keys: &mut Keys, ak_handle: u32) -> Result<(), TpmError> {
    let foreign = |handle| TpmError::ForeignKey { handle };
    let (ak, public) = persistent_key(device, ak_handle)?.ok_or_else(|| foreign(ak_handle))?;
    if marshal_public(&public)? != keys.identity.ak_public {
        return Err(foreign(ak_handle));
    }
    if let Endorsement::Persistent(ek) = &mut keys.ek {
        *ek = persistent_key(device, EK_HANDLE)?.ok_or_else(|| foreign(EK_HANDLE))?.0;
    }
    keys.ak = ak;
    Ok(())
}

fn identify(
    device: &mut Device,
    ek: Endorsement,
    ek_public: &Public,
    ak_handle: u32,
    kind: AkKind,
) -> Result<Keys, TpmError> {
    let Ak {
        handle: ak,
        public: ak_public,
        replaced: ak_replaced,
    } = ak::find_or_make(device, ak_handle, kind)?;
    let manufacturer = device.property(PropertyTag::Manufacturer)?.to_be_bytes();
    let firmware = (
        device.property(PropertyTag::FirmwareVersion1)?,
        device.property(PropertyTag::FirmwareVersion2)?,
    );
    let identity = Identity {
        ek_public: marshal_public(ek_public)?,
        ek_certificate: ek_certificate(device)?,
        ak_public: marshal_public(&ak_public)?,
        ak_kind: kind,
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

/// The endorsement key: where makers or provisioning put it, or made by the agent.
enum Endorsement {
    Persistent(KeyHandle),
    /// Made once, as that takes some TPMs most of a minute, and kept outside as the TPM's own encrypted context.
    Saved(Box<TpmsContext>),
}

impl Endorsement {
    fn find_or_make(device: &mut Device) -> Result<(Self, Public), TpmError> {
        if let Some((handle, public)) = persistent_key(device, EK_HANDLE)?
            && same_template(&public, &endorsement_template()?)
        {
            return Ok((Self::Persistent(handle), public));
        }
        let (key, public) = make_endorsement_key(device)?;
        let saved = device.run("TPM2_ContextSave", |context| context.context_save(key.into()));
        device.flush(key.into());
        Ok((Self::Saved(Box::new(saved?)), public))
    }

    /// Has the key loaded while `work` runs.
    fn with<T>(
        &self,
        device: &mut Device,
        work: impl FnOnce(&mut Device, KeyHandle) -> Result<T, TpmError>,
    ) -> Result<T, TpmError> {
        let saved = match self {
            Self::Persistent(key) => return work(device, *key),
            Self::Saved(saved) => saved,
        };
        let load = |context: &mut Context| context.context_load(TpmsContext::clone(saved));
        let key = match device.run("TPM2_ContextLoad", load) {
            Ok(object) => KeyHandle::from(object),
            // A context does not outlive a TPM reset (suspend to RAM on some machines); the template gives the same key.
            Err(TpmError::Refused { .. }) => make_endorsement_key(device)?.0,
            Err(error) => return Err(error),
        };
        let result = work(device, key);
        device.flush(key.into());
        result
    }
}

fn make_endorsement_key(device: &mut Device) -> Result<(KeyHandle, Public), TpmError> {
    let template = endorsement_template()?;
    let made = device.run_authorised("TPM2_CreatePrimary", |context| {
        context.create_primary(Hierarchy::Endorsement, template.clone(), None, None, None, None)
    })?;
    Ok((made.key_handle, made.out_public))
}

/// RSA-2048, template L-1 of the TCG EK Credential Profile.
fn endorsement_template() -> Result<Public, TpmError> {
    let algorithm = AsymmetricAlgorithmSelection::Rsa(RsaKeyBits::Rsa2048);
    let template = ek::create_ek_public_from_default_template_2(algorithm, None::<DefaultKey>);
    template.map_err(|source| TpmError::Refused {
        operation: "endorsement key template",
        source,
    })
}

fn ek_certificate(device: &mut Device) -> Result<Option<Vec<u8>>, TpmError> {
    const OPERATION: &str = "TPM2_NV_Read(endorsement certificate)";
    if !device.has_handle(EK_CERTIFICATE)? {
        return Ok(None);
    }
    let index = NvIndexTpmHandle::new(EK_CERTIFICATE).map_err(|source| TpmError::Refused {
        operation: OPERATION,
        source,
    })?;
    // An index that cannot be read is as good as none: the operator pins the key by hash then.
    let read = device.run_authorised(OPERATION, |context| {
        let handle =
            context.execute_without_session(|context| context.tr_from_tpm_public(TpmHandle::NvIndex(index)))?;
        nv::read_full(context, NvAuth::NvIndex(handle.into()), index)
    });
    match read {
        Ok(certificate) if (1..=EK_CERTIFICATE_MAX).contains(&certificate.len()) => Ok(Some(certificate)),
        Ok(certificate) => {
            tracing::warn!(
                bytes = certificate.len(),
                "the endorsement certificate has an impossible size: left out"
            );
            Ok(None)
        }
        Err(TpmError::Refused { source, .. }) => {
            tracing::warn!(error = %source, "the endorsement certificate cannot be read: left out");
            Ok(None)
        }
        Err(error) => Err(error),
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
