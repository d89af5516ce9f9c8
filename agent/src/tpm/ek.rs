//! The endorsement key: where its maker or a provisioning put it, or made from its template, which always gives the same key.

use core::fmt;

use tss_esapi::Context;
use tss_esapi::abstraction::{AsymmetricAlgorithmSelection, DefaultKey, ek};
use tss_esapi::handles::KeyHandle;
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::key_bits::RsaKeyBits;
use tss_esapi::interface_types::resource_handles::Hierarchy;
use tss_esapi::structures::{EccParameter, EccPoint, Public, PublicKeyRsa};
use tss_esapi::traits::UnMarshall as _;
use tss_esapi::utils::TpmsContext;

use super::TpmError;
use super::device::Device;
use super::keys::{persistent_key, same_template};
use super::nv;

/// Bytes of an RSA-2048 modulus, and of a coordinate on P-256: what a template's unique field has.
const MODULUS: usize = 256;
const COORDINATE: usize = 32;

/// A TPMT_PUBLIC of these kinds has less than 400 bytes, a nonce at most [`MODULUS`].
const TEMPLATE_MAX: usize = 1024;

/// Which endorsement key: one of the two that every PC's TPM can have a certificate for (TCG EK Credential Profile 2.5, templates L-1
/// and L-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EkKind {
    /// RSA with 2048 bits, template L-1.
    Rsa2048,
    /// NIST P-256, template L-2.
    EccP256,
}

impl EkKind {
    const ALL: [Self; 2] = [Self::Rsa2048, Self::EccP256];

    /// As `[tpm] ek` in agent.toml has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rsa2048 => "rsa-2048",
            Self::EccP256 => "ecc-p256",
        }
    }

    /// The kind with this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Where provisioning keeps it (TCG TPM v2.0 Provisioning Guidance; the ECC key's is by custom the next one).
    const fn handle(self) -> u32 {
        match self {
            Self::Rsa2048 => 0x8101_0001,
            Self::EccP256 => 0x8101_0002,
        }
    }

    /// NV index of its certificate (EK Credential Profile, 2.2.1.4, low range).
    pub(super) const fn certificate(self) -> u32 {
        match self {
            Self::Rsa2048 => 0x01c0_0002,
            Self::EccP256 => 0x01c0_000a,
        }
    }

    /// NV index of the nonce that its unique field begins with, if the maker chose one.
    const fn nonce(self) -> u32 {
        self.certificate() + 1
    }

    /// Bytes of the nonce, at most.
    const fn nonce_max(self) -> usize {
        match self {
            Self::Rsa2048 => MODULUS,
            Self::EccP256 => COORDINATE,
        }
    }

    /// NV index of its template, if the maker chose another than the profile's.
    const fn template(self) -> u32 {
        self.certificate() + 2
    }

    /// The profile's template, with policy PolicySecret(TPM_RH_ENDORSEMENT).
    fn default_template(self) -> Result<Public, TpmError> {
        let algorithm = match self {
            Self::Rsa2048 => AsymmetricAlgorithmSelection::Rsa(RsaKeyBits::Rsa2048),
            Self::EccP256 => AsymmetricAlgorithmSelection::Ecc(EccCurve::NistP256),
        };
        ek::create_ek_public_from_default_template_2(algorithm, None::<DefaultKey>).map_err(refused)
    }
}

fn refused(source: tss_esapi::Error) -> TpmError {
    TpmError::Refused {
        operation: "endorsement key template",
        source,
    }
}

impl fmt::Display for EkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The kind that is asked for; or else that whose certificate the TPM has, RSA first, as that is what most makers certify.
///
/// # Errors
/// Those of asking the TPM.
pub(super) fn choose(device: &mut Device, wanted: Option<EkKind>) -> Result<EkKind, TpmError> {
    if let Some(kind) = wanted {
        return Ok(kind);
    }
    for kind in EkKind::ALL {
        if device.has_handle(kind.certificate())? {
            return Ok(kind);
        }
    }
    Ok(EkKind::Rsa2048)
}

/// The key in the TPM.
pub(super) struct Ek {
    pub kind: EkKind,
    pub public: Public,
    place: Place,
    template: Public,
}

enum Place {
    Persistent(KeyHandle),
    /// Made once, as that takes some TPMs most of a minute, and kept outside as the TPM's own encrypted context.
    Saved(Box<TpmsContext>),
}

impl Ek {
    /// Takes the persistent key of this kind, if it has the expected public area, and makes it otherwise.
    ///
    /// # Errors
    /// Any.
    pub(super) fn find_or_make(device: &mut Device, kind: EkKind) -> Result<Self, TpmError> {
        let template = template(device, kind)?;
        if let Some((handle, public)) = persistent_key(device, kind.handle())?
            && same_template(&public, &template)
        {
            return Ok(Self {
                kind,
                public,
                place: Place::Persistent(handle),
                template,
            });
        }
        let (key, public) = make(device, &template)?;
        let saved = device.run("TPM2_ContextSave", |context| context.context_save(key.into()));
        device.flush(key.into());
        Ok(Self {
            kind,
            public,
            place: Place::Saved(Box::new(saved?)),
            template,
        })
    }

    /// The same key through a new connection.
    ///
    /// # Errors
    /// [`TpmError::Nonsense`] when the TPM has another one now, and any other.
    pub(super) fn find_again(&mut self, device: &mut Device) -> Result<(), TpmError> {
        // A context is good for any connection.
        if matches!(self.place, Place::Persistent(_)) {
            let again = Self::find_or_make(device, self.kind)?;
            if again.public != self.public {
                return Err(TpmError::Nonsense {
                    operation: "TPM2_ReadPublic",
                    what: "the endorsement key is another one than at the start",
                });
            }
            *self = again;
        }
        Ok(())
    }

    /// Has the key loaded while `work` runs.
    ///
    /// # Errors
    /// Those of loading or making it, and those of `work`.
    pub(super) fn with<T>(
        &self,
        device: &mut Device,
        work: impl FnOnce(&mut Device, KeyHandle) -> Result<T, TpmError>,
    ) -> Result<T, TpmError> {
        let saved = match &self.place {
            Place::Persistent(key) => return work(device, *key),
            Place::Saved(saved) => saved,
        };
        let load = |context: &mut Context| context.context_load(TpmsContext::clone(saved));
        let key = match device.run("TPM2_ContextLoad", load) {
            Ok(object) => KeyHandle::from(object),
            // A context does not outlive a TPM reset (suspend to RAM on some machines); the template gives the same key.
            Err(TpmError::Refused { .. }) => make(device, &self.template)?.0,
            Err(error) => return Err(error),
        };
        let result = work(device, key);
        device.flush(key.into());
        result
    }
}

fn make(device: &mut Device, template: &Public) -> Result<(KeyHandle, Public), TpmError> {
    let made = device.run_authorised("TPM2_CreatePrimary", |context| {
        context.create_primary(Hierarchy::Endorsement, template.clone(), None, None, None, None)
    })?;
    Ok((made.key_handle, made.out_public))
}

/// The template that this TPM's key is made from: the maker's, if there is one beside the certificate, or the profile's; and in it
/// the maker's nonce (EK Credential Profile, 2.2.1.4 and B.3).
fn template(device: &mut Device, kind: EkKind) -> Result<Public, TpmError> {
    let profile = kind.default_template()?;
    let template = match nv::read(device, kind.template(), "endorsement key's template", TEMPLATE_MAX)? {
        None => profile,
        Some(bytes) => match Public::unmarshall(&bytes) {
            Ok(maker) if same_policy(&maker, &profile) => maker,
            _ => {
                tracing::warn!(
                    "the TPM's template for its {kind} endorsement key is none that this agent can use: the standard one is taken"
                );
                profile
            }
        },
    };
    match nv::read(device, kind.nonce(), "endorsement key's nonce", kind.nonce_max())? {
        None => Ok(template),
        Some(nonce) => with_nonce(template, &nonce).map_err(refused),
    }
}

/// Whether a maker's template is for a key of the same kind that is used under the same policy: the one which is satisfied here.
fn same_policy(maker: &Public, profile: &Public) -> bool {
    let mut maker = maker.clone();
    if let Public::Rsa { object_attributes, .. } | Public::Ecc { object_attributes, .. } = &mut maker {
        *object_attributes = profile.object_attributes();
    }
    same_template(&maker, profile)
}

/// The template with the nonce at the beginning of its unique field. What stands there behind it stays, as with tpm2-tools; it is zero in
/// the profile's templates.
fn with_nonce(mut template: Public, nonce: &[u8]) -> tss_esapi::Result<Public> {
    match &mut template {
        Public::Rsa { unique, .. } => {
            *unique = PublicKeyRsa::try_from(overlaid(unique.value(), nonce, MODULUS))?;
        }
        Public::Ecc { unique, .. } => {
            let x = overlaid(unique.x().value(), nonce, COORDINATE);
            let y = overlaid(unique.y().value(), &[], COORDINATE);
            *unique = EccPoint::new(EccParameter::try_from(x)?, EccParameter::try_from(y)?);
        }
        // No template of an endorsement key.
        Public::KeyedHash { .. } | Public::SymCipher { .. } => {}
    }
    Ok(template)
}

/// `over`, then what `below` has behind that, then zeros up to this size.
fn overlaid(below: &[u8], over: &[u8], size: usize) -> Vec<u8> {
    let behind = below.iter().skip(over.len());
    let zeros = std::iter::repeat(&0);
    over.iter().chain(behind).chain(zeros).take(size).copied().collect()
}
