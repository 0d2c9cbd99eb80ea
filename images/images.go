// Package images builds, keeps and checks a cluster's boot image.
//
// An image is a directory of artefacts with a manifest:
//
//	manifest.json     what is in it: sizes, digests, versions
//	sbom.cdx.json     CycloneDX software bill of materials
//	vmlinuz           the signed Debian kernel, byte for byte
//	initramfs.img     stage 1 (package initramfs)
//	base.tar.zst      the Debian root
//	modules.tar.zst   the kernel's modules for that root
//	overlay.tar       krg, the Kerrighed command names, image.json
//	boot/             network boot loaders for TFTP
//
// A build is a row of parts (file build.go), each made from named inputs and
// kept under state/parts by the digest of those inputs: a part is made again
// only when they change, or when asked with --rebuild. The parts are assembled
// into a new directory beside the current image, which the link image/current
// names; moving that link is the last step, so a build that is interrupted or
// fails leaves the old image as it was.
package images

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"krgimage/initramfs"
)

// DefaultEpoch is the time stamp of everything in an image when
// SOURCE_DATE_EPOCH is not set: the release day of Debian 13. A constant and
// not the clock, so that the same inputs give the same bytes.
var DefaultEpoch = time.Date(2025, 8, 9, 0, 0, 0, 0, time.UTC)

// Names of the artefacts in an image directory.
const (
	KernelFile    = "vmlinuz"
	InitramfsFile = "initramfs.img"
	BaseFile      = "base.tar.zst"
	ModulesFile   = "modules.tar.zst"
	OverlayFile   = "overlay.tar"
	SBOMFile      = "sbom.cdx.json"
	ManifestFile  = "manifest.json"
	LoaderDir     = "boot"
)

// manifestFormat changes when an older krgimage can't use the image.
const manifestFormat = 1

// Manifest describes an image. It holds nothing of the build machine or the
// time of day, so equal images have equal manifests.
type Manifest struct {
	Format    int                 `json:"format"`
	Name      string              `json:"name"`     // cluster name
	Version   string              `json:"version"`  // of krgimage
	BuildID   string              `json:"build_id"` // digest of all inputs, 16 hex digits
	Created   time.Time           `json:"created"`  // SOURCE_DATE_EPOCH
	Suite     string              `json:"suite"`
	Kernel    Kernel              `json:"kernel"`
	KrgSHA256 string              `json:"krg_sha256"`
	Initramfs initramfs.Selection `json:"initramfs"`
	Packages  int                 `json:"packages"` // Debian packages in the root
	Artefacts []Artefact          `json:"artefacts"`
}

// Kernel names the kernel of an image.
type Kernel struct {
	Release string `json:"release"` // uname -r
	Package string `json:"package"`
	Version string `json:"version"` // Debian version
}

// Artefact is one file of an image; Path is relative to the image directory.
type Artefact struct {
	Path   string `json:"path"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// Image is an image on disk whose manifest was read.
type Image struct {
	Dir      string
	Manifest Manifest
}

// Path returns the path of an artefact.
func (im *Image) Path(name string) string { return filepath.Join(im.Dir, filepath.FromSlash(name)) }

// Digest returns an artefact's SHA-256 in hex, or "" when the image has none
// of that name.
func (im *Image) Digest(name string) string {
	i := slices.IndexFunc(im.Manifest.Artefacts, func(a Artefact) bool { return a.Path == name })
	if i < 0 {
		return ""
	}
	return im.Manifest.Artefacts[i].SHA256
}

// ErrNoImage says that nothing was built in a state directory yet.
var ErrNoImage = errors.New("no image was built yet: run 'krgimage build'")

// DamagedError says that an artefact is not what the manifest says.
type DamagedError struct {
	File   string
	Reason string
}

func (e *DamagedError) Error() string {
	return fmt.Sprintf("image file %s is damaged: %s; run 'krgimage build' to make it again", e.File, e.Reason)
}

// Current opens the current image of a state directory.
func Current(state string) (*Image, error) {
	link := currentLink(state)
	dir, err := filepath.EvalSymlinks(link)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", state, ErrNoImage)
	}
	if err != nil {
		return nil, fmt.Errorf("open the current image: %w", err)
	}
	return open(dir)
}

func open(dir string) (*Image, error) {
	file := filepath.Join(dir, ManifestFile)
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, &DamagedError{file, err.Error()}
	}
	im := &Image{Dir: dir}
	if err := json.Unmarshal(data, &im.Manifest); err != nil {
		return nil, &DamagedError{file, err.Error()}
	}
	if im.Manifest.Format != manifestFormat {
		return nil, fmt.Errorf("image %s has format %d, this krgimage reads %d: run 'krgimage build'", dir, im.Manifest.Format, manifestFormat)
	}
	return im, nil
}

// Verify reads every artefact and compares size and digest with the manifest.
// It returns a *DamagedError for the first that differs.
func (im *Image) Verify() error {
	for _, a := range im.Manifest.Artefacts {
		if !filepath.IsLocal(filepath.FromSlash(a.Path)) {
			return &DamagedError{filepath.Join(im.Dir, ManifestFile), fmt.Sprintf("artefact path %q leaves the image", a.Path)}
		}
		got, err := describe(im.Dir, a.Path)
		if err != nil {
			return &DamagedError{im.Path(a.Path), err.Error()}
		}
		if got.Size != a.Size {
			return &DamagedError{im.Path(a.Path), fmt.Sprintf("%d bytes, the manifest says %d", got.Size, a.Size)}
		}
		if got.SHA256 != a.SHA256 {
			return &DamagedError{im.Path(a.Path), "its SHA-256 is not the manifest's"}
		}
	}
	return nil
}

// describe measures one file of a directory.
func describe(dir, name string) (Artefact, error) {
	f, err := os.Open(filepath.Join(dir, filepath.FromSlash(name)))
	if err != nil {
		return Artefact{}, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err != nil {
		return Artefact{}, err
	}
	return Artefact{name, n, hex.EncodeToString(h.Sum(nil))}, nil
}

func currentLink(state string) string { return filepath.Join(state, "image", "current") }

// Package is a Debian package that went into an image. SHA256 is that of the
// package file; it's empty for those of the root, whose files are in the digest
// of BaseFile.
type Package struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	Arch    string `json:"arch"`
	SHA256  string `json:"sha256,omitempty"`
}
