//! The attestation key: a primary key of the endorsement hierarchy at a persistent handle. Its template always gives the same key,
//! so that nothing is lost with the copy in the TPM.

use core::fmt;

use tss_esapi::attributes::ObjectAttributesBuilder;
use tss_esapi::handles::{KeyHandle, ObjectHandle};
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, PublicAlgorithm};
use tss_esapi::interface_types::dynamic_handles::Persistent;
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::key_bits::RsaKeyBits;
use tss_esapi::interface_types::resource_handles::{Hierarchy, Provision};
use tss_esapi::structures::{
    EccPoint, EccScheme, HashScheme, KeyDerivationFunctionScheme, Public, PublicBuilder, PublicEccParametersBuilder,
    PublicKeyRsa, PublicRsaParametersBuilder, RsaExponent, RsaScheme,
};

use super::TpmError;
use super::device::Device;
use super::keys::{persistent_handle, persistent_key, same_template};

/// Which algorithm the attestation key signs with, always over SHA-256.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AkKind {
    /// ECDSA on NIST P-256.
    EcdsaP256,
    /// RSASSA-PKCS1-v1_5 with 2048 bits, for TPMs without P-256 or with a slow one.
    Rsa2048,
}

impl AkKind {
    const ALL: [Self; 2] = [Self::EcdsaP256, Self::Rsa2048];

    /// As `[tpm] ak` in agent.toml has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::EcdsaP256 => "ecdsa-p256",
            Self::Rsa2048 => "rsa-2048",
        }
    }

    /// The kind with this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Restricted: it signs nothing but what the TPM itself made.
    fn template(self) -> Result<Public, TpmError> {
        let template = match self {
            Self::EcdsaP256 => ecdsa_template(),
            Self::Rsa2048 => rsa_template(),
        };
        template.map_err(|source| TpmError::Refused {
            operation: "attestation key template",
            source,
        })
    }
}

impl fmt::Display for AkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The key in the TPM.
pub(super) struct Ak {
    pub handle: KeyHandle,
    pub public: Public,
    /// The kind of the key that was at the handle before.
    pub replaced: Option<AkKind>,
}

/// Finds the key of this kind at the handle, or makes it there. An attestation key of the other kind gives way: the
/// configuration is the operator's word, and it can be made again.
///
/// # Errors
/// [`TpmError::ForeignKey`] when the handle holds anybody else's key, and any other.
pub(super) fn find_or_make(device: &mut Device, ak_handle: u32, kind: AkKind) -> Result<Ak, TpmError> {
    let template = kind.template()?;
    let Some((handle, public)) = persistent_key(device, ak_handle)? else {
        return make(device, ak_handle, template);
    };
    if same_template(&public, &template) {
        let replaced = None;
        return Ok(Ak {
            handle,
            public,
            replaced,
        });
    }
    let other = kind_of(&public)?.ok_or(TpmError::ForeignKey { handle: ak_handle })?;
    let persistent = Persistent::Persistent(persistent_handle(ak_handle)?);
    device.run_authorised("TPM2_EvictControl", |context| {
        context.evict_control(Provision::Owner, handle.into(), persistent)
    })?;
    tracing::warn!(
        "the attestation key was {other} and is {kind} now, as [tpm] ak in agent.toml says: verifiers refuse this host until \
         an operator enrols it anew (assay-verifier host remove, then host add)"
    );
    Ok(Ak {
        replaced: Some(other),
        ..make(device, ak_handle, template)?
    })
}

/// Which of the attestation keys this is, if it is one.
fn kind_of(public: &Public) -> Result<Option<AkKind>, TpmError> {
    for kind in AkKind::ALL {
        if same_template(public, &kind.template()?) {
            return Ok(Some(kind));
        }
    }
    Ok(None)
}

fn make(device: &mut Device, ak_handle: u32, template: Public) -> Result<Ak, TpmError> {
    let made = device.run_authorised("TPM2_CreatePrimary", |context| {
        context.create_primary(Hierarchy::Endorsement, template.clone(), None, None, None, None)
    })?;
    let persistent = Persistent::Persistent(persistent_handle(ak_handle)?);
    let transient = ObjectHandle::from(made.key_handle);
    let kept = device.run_authorised("TPM2_EvictControl", |context| {
        context.evict_control(Provision::Owner, transient, persistent)
    });
    let handle = match kept {
        Ok(handle) => {
            device.flush(transient);
            handle.into()
        }
        Err(error @ TpmError::Refused { .. }) => {
            // The template always gives the same key, so a restart finds it again; it only takes a slot and some time.
            tracing::warn!(%error, "the attestation key cannot be made persistent (owner password set, or no room): kept in memory");
            made.key_handle
        }
        Err(error) => {
            device.flush(transient);
            return Err(error);
        }
    };
    Ok(Ak {
        handle,
        public: made.out_public,
        replaced: None,
    })
}

fn ecdsa_template() -> tss_esapi::Result<Public> {
    let parameters = PublicEccParametersBuilder::new()
        .with_ecc_scheme(EccScheme::EcDsa(HashScheme::new(HashingAlgorithm::Sha256)))
        .with_curve(EccCurve::NistP256)
        .with_key_derivation_function_scheme(KeyDerivationFunctionScheme::Null)
        .with_is_signing_key(true)
        .with_restricted(true)
        .build()?;
    let builder = PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::Ecc)
        .with_ecc_parameters(parameters)
        .with_ecc_unique_identifier(EccPoint::default());
    restricted_signing(builder)
}

fn rsa_template() -> tss_esapi::Result<Public> {
    let parameters = PublicRsaParametersBuilder::new()
        .with_scheme(RsaScheme::RsaSsa(HashScheme::new(HashingAlgorithm::Sha256)))
        .with_key_bits(RsaKeyBits::Rsa2048)
        .with_exponent(RsaExponent::ZERO_EXPONENT)
        .with_is_signing_key(true)
        .with_restricted(true)
        .build()?;
    let builder = PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::Rsa)
        .with_rsa_parameters(parameters)
        .with_rsa_unique_identifier(PublicKeyRsa::default());
    restricted_signing(builder)
}

/// What the verifier checks of either kind. Without dictionary attack protection: there is no password to guess, and a TPM that met a
/// few power cuts, or somebody's guesses at other keys, would sign nothing.
fn restricted_signing(builder: PublicBuilder) -> tss_esapi::Result<Public> {
    let attributes = ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_sensitive_data_origin(true)
        .with_user_with_auth(true)
        .with_no_da(true)
        .with_restricted(true)
        .with_sign_encrypt(true)
        .build()?;
    builder
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes)
        .build()
}
