package images

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/renameio/v2"

	"krgimage/configs"
	"krgimage/images/progress"
	"krgimage/initramfs"
)

// Source is where the Debian parts of an image come from; package
// nfsroot/debian in life. Every method fills dst and returns the packages used.
type Source interface {
	// Base writes BaseFile, the Debian root without kernel.
	Base(ctx context.Context, dst string, step *progress.Step) ([]Package, error)
	// Kernel writes KernelFile, ModulesFile and, for the initramfs, the modules
	// with depmod's indexes below ModulesTree.
	Kernel(ctx context.Context, dst string, step *progress.Step) (Kernel, []Package, error)
	// Firmware unpacks firmware packages: dst stands for /lib/firmware.
	Firmware(ctx context.Context, dst string, step *progress.Step) ([]Package, error)
	// Loaders writes the files of Loaders to dst.
	Loaders(ctx context.Context, dst string, step *progress.Step) ([]Package, error)
	// Inputs names what decides the result of a method besides the
	// configuration: the base package set and the version of the method.
	Inputs() any
}

// Loaders are the boot loaders of LoaderDir: iPXE for BIOS and UEFI, and the
// classic pxelinux.
var Loaders = []string{"undionly.kpxe", "ipxe.pxe", "snponly.efi", "pxelinux.0", "ldlinux.c32"}

// ModulesTree is where Source.Kernel leaves the unpacked modules: a directory
// named by the kernel's release.
const ModulesTree = "tree/root/usr/lib/modules"

// Parts are the names that BuildOptions.Rebuild takes, in build order.
var Parts = []string{"packages", "kernel", "firmware", "loaders", "init", "modules", "rescue", "overlay"}

// Link is a symbolic link of the overlay: Path (absolute, in the root) → Target.
type Link struct{ Path, Target string }

// File is a regular file of the overlay, readable by all: Path is absolute, in
// the root.
type File struct {
	Path string
	Data []byte
}

// BuildOptions says what to build and where.
type BuildOptions struct {
	State   string // state directory
	Cluster configs.Cluster
	Source  Source
	Krg     []byte   // static node binary
	Rescue  []byte   // u-root's commands, a newc archive; empty: no rescue shell
	Links   []Link   // command names of krg in the root
	Files   []File   // what goes with the commands: manual pages, completion
	Rebuild []string // names of Parts to make even if their inputs are the same; "all" is every one
	Epoch   time.Time
	Version string // of krgimage
	Report  *progress.Reporter
}

// krgPath is where the node binary lies in the root.
const krgPath = "usr/sbin/krg"

// ImageInfoPath is the file of the root that stage 1 checks before it switches
// to it.
const ImageInfoPath = "etc/krgimage/image.json"

// ImageInfo is the content of ImageInfoPath.
type ImageInfo struct {
	Name          string `json:"name"`
	Version       string `json:"version"`
	KrgSHA256     string `json:"krg_sha256"`
	KernelRelease string `json:"kernel_release"`
	BuildID       string `json:"build_id"`
}

// Build makes the image and switches to it. On any error the current image
// stays what it was.
func Build(ctx context.Context, o BuildOptions) (*Image, error) {
	w, err := newWorkshop(o)
	if err != nil {
		return nil, err
	}
	unlock, err := Lock(filepath.Join(o.State, "build.lock"), "build")
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := checkPayload(o); err != nil {
		return nil, err
	}

	c := &o.Cluster
	debian := struct {
		Debian configs.Debian
		Epoch  int64
		Source any
	}{c.Debian, o.Epoch.Unix(), o.Source.Inputs()}

	packages, err := w.get(ctx, part{"packages", "Debian root", debian, func(ctx context.Context, dir string, step *progress.Step) (string, error) {
		list, err := o.Source.Base(ctx, dir, step)
		return fmt.Sprintf("%d packages", len(list)), errors.Join(err, writeJSON(filepath.Join(dir, packagesFile), list))
	}})
	if err != nil {
		return nil, err
	}
	kernel, err := w.get(ctx, part{"kernel", "Debian kernel", []any{c.Kernel.Flavour, debianWithoutPackages(c.Debian), o.Source.Inputs()},
		func(ctx context.Context, dir string, step *progress.Step) (string, error) {
			k, list, err := o.Source.Kernel(ctx, dir, step)
			return k.Release, errors.Join(err, writeJSON(filepath.Join(dir, packagesFile), list), writeJSON(filepath.Join(dir, kernelFile), k))
		}})
	if err != nil {
		return nil, err
	}
	firmware, err := w.get(ctx, part{"firmware", "Firmware packages", []any{c.Initramfs.Firmware, debianWithoutPackages(c.Debian), o.Source.Inputs()},
		func(ctx context.Context, dir string, step *progress.Step) (string, error) {
			tree := filepath.Join(dir, firmwareTree)
			if err := os.Mkdir(tree, 0o755); err != nil {
				return "", err
			}
			list, err := o.Source.Firmware(ctx, tree, step)
			return fmt.Sprintf("%d packages", len(list)), errors.Join(err, writeJSON(filepath.Join(dir, packagesFile), list))
		}})
	if err != nil {
		return nil, err
	}
	loaders, err := w.get(ctx, part{"loaders", "Boot loaders", []any{Loaders, debianWithoutPackages(c.Debian), o.Source.Inputs()},
		func(ctx context.Context, dir string, step *progress.Step) (string, error) {
			tree := filepath.Join(dir, LoaderDir)
			if err := os.Mkdir(tree, 0o755); err != nil {
				return "", err
			}
			list, err := o.Source.Loaders(ctx, tree, step)
			return strings.Join(Loaders, " "), errors.Join(err, writeJSON(filepath.Join(dir, packagesFile), list))
		}})
	if err != nil {
		return nil, err
	}

	krgDigest := hexDigest(o.Krg)
	initMember, err := w.get(ctx, part{"init", "Stage 1", []any{krgDigest, o.Version},
		member(func(w io.Writer) (string, error) { return "krg", initramfs.Init(w, o.Krg) })})
	if err != nil {
		return nil, err
	}
	var release Kernel
	if err := kernel.read(kernelFile, &release); err != nil {
		return nil, err
	}
	modules, err := w.get(ctx, part{"modules", "Drivers and firmware", []any{kernel.digests(), firmware.digests(), initramfs.DefaultModules, c.Initramfs.Modules, o.Version},
		func(ctx context.Context, dir string, step *progress.Step) (string, error) {
			src := initramfs.Source{Modules: kernel.path(path.Join(ModulesTree, release.Release)), Firmware: firmware.path(firmwareTree)}
			var sel initramfs.Selection
			made := member(func(w io.Writer) (detail string, err error) {
				sel, err = initramfs.Modules(w, src, c.Initramfs.Modules)
				return fmt.Sprintf("%d modules, %d firmware files", len(sel.Modules), len(sel.Firmware)), err
			})
			detail, err := made(ctx, dir, step)
			return detail, errors.Join(err, writeJSON(filepath.Join(dir, selectionFile), sel))
		}})
	if err != nil {
		return nil, err
	}
	members := []*partResult{initMember, modules}
	if c.Initramfs.RescueShell {
		rescue, err := w.get(ctx, part{"rescue", "Rescue commands", []any{hexDigest(o.Rescue), o.Version},
			member(func(w io.Writer) (string, error) { return "u-root", initramfs.Rescue(w, o.Rescue) })})
		if err != nil {
			return nil, err
		}
		members = append(members, rescue)
	}

	info := ImageInfo{Name: c.Name, Version: o.Version, KrgSHA256: krgDigest, KernelRelease: release.Release}
	if info.BuildID, err = digestJSON([]any{info, packages.digests(), kernel.digests(), loaders.digests(), digestsOf(members)}); err != nil {
		return nil, err
	}
	overlay, err := w.get(ctx, part{"overlay", "krg and its commands", []any{info, o.Links, o.Files, o.Epoch.Unix()},
		func(_ context.Context, dir string, _ *progress.Step) (string, error) {
			return fmt.Sprintf("krg and %d names", len(o.Links)), writeOverlay(filepath.Join(dir, OverlayFile), o, info)
		}})
	if err != nil {
		return nil, err
	}

	step := o.Report.Step("Image")
	im, err := assemble(ctx, o, info, release, image{packages, kernel, firmware, loaders, overlay, members, modules})
	if err != nil {
		return nil, step.Fail(explain(err, o.State))
	}
	if err := w.prune(); err != nil {
		return nil, step.Fail(fmt.Errorf("remove old build parts: %w", err))
	}
	step.Done("%s, initramfs %s", info.BuildID, progress.Size(im.size(InitramfsFile)))
	return im, nil
}

// Files of the parts that don't go into the image as they are.
const (
	packagesFile  = "packages.json"
	kernelFile    = "kernel.json"
	selectionFile = "selection.json"
	memberFile    = "member.cpio.zst"
	firmwareTree  = "firmware"
)

func newWorkshop(o BuildOptions) (*workshop, error) {
	w := &workshop{dir: filepath.Join(o.State, "parts"), report: o.Report, rebuild: map[string]bool{}, used: map[string]bool{}}
	for _, name := range o.Rebuild {
		switch {
		case name == "all":
			for _, p := range Parts {
				w.rebuild[p] = true
			}
		case slices.Contains(Parts, name):
			w.rebuild[name] = true
		default:
			return nil, fmt.Errorf("--rebuild %s: there is no such part; the parts are all, %s", name, strings.Join(Parts, ", "))
		}
	}
	if err := os.MkdirAll(w.dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the build directory: %w", err)
	}
	return w, nil
}

func checkPayload(o BuildOptions) error {
	if len(o.Krg) == 0 || o.Cluster.Initramfs.RescueShell && len(o.Rescue) == 0 {
		return initramfs.ErrNotPrepared
	}
	return nil
}

// debianWithoutPackages is what decides which version of a single package the
// archive gives: the list of the root's packages has no say in it.
func debianWithoutPackages(d configs.Debian) configs.Debian {
	d.Packages = nil
	return d
}

// member makes a part of one initramfs member.
func member(write func(io.Writer) (string, error)) func(context.Context, string, *progress.Step) (string, error) {
	return func(_ context.Context, dir string, _ *progress.Step) (string, error) {
		f, err := os.Create(filepath.Join(dir, memberFile))
		if err != nil {
			return "", err
		}
		detail, err := write(f)
		return detail, errors.Join(err, f.Close())
	}
}

// writeOverlay writes what lies over the Debian root: krg, its names, and the
// file that stage 1 checks. Regular files come as they must be when they appear,
// so that the live root can take them one by one.
func writeOverlay(file string, o BuildOptions, info ImageInfo) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	tw := tar.NewWriter(f)
	put := func(h tar.Header, data []byte) {
		h.ModTime, h.Size, h.Format = o.Epoch, int64(len(data)), tar.FormatPAX
		if e := tw.WriteHeader(&h); err == nil {
			err = e
		}
		if _, e := tw.Write(data); err == nil {
			err = e
		}
	}
	infoJSON, err := json.MarshalIndent(info, "", "  ")
	if err != nil {
		return err
	}
	put(tar.Header{Typeflag: tar.TypeDir, Name: path.Dir(ImageInfoPath) + "/", Mode: 0o755}, nil)
	put(tar.Header{Typeflag: tar.TypeReg, Name: krgPath, Mode: 0o755}, o.Krg)
	links := slices.Clone(o.Links)
	slices.SortFunc(links, func(a, b Link) int { return strings.Compare(a.Path, b.Path) })
	for _, l := range links {
		put(tar.Header{Typeflag: tar.TypeSymlink, Name: strings.TrimPrefix(l.Path, "/"), Linkname: l.Target, Mode: 0o777}, nil)
	}
	for _, f := range slices.SortedFunc(slices.Values(o.Files), func(a, b File) int { return strings.Compare(a.Path, b.Path) }) {
		put(tar.Header{Typeflag: tar.TypeReg, Name: strings.TrimPrefix(f.Path, "/"), Mode: 0o644}, f.Data)
	}
	put(tar.Header{Typeflag: tar.TypeReg, Name: ImageInfoPath, Mode: 0o644}, append(infoJSON, '\n'))
	return errors.Join(err, tw.Close(), f.Close())
}

// image is the set of finished parts.
type image struct {
	packages, kernel, firmware, loaders, overlay *partResult
	members                                      []*partResult
	modules                                      *partResult
}

// assemble puts the parts into a new image directory and switches to it.
func assemble(ctx context.Context, o BuildOptions, info ImageInfo, release Kernel, parts image) (*Image, error) {
	store := filepath.Join(o.State, "image")
	partial := filepath.Join(store, info.BuildID+".partial")
	if err := os.RemoveAll(partial); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(partial, LoaderDir), 0o755); err != nil {
		return nil, err
	}
	defer os.RemoveAll(partial)

	m := Manifest{Format: manifestFormat, Name: info.Name, Version: o.Version, BuildID: info.BuildID, Created: o.Epoch.UTC(),
		Suite: o.Cluster.Debian.Suite, Kernel: release, KrgSHA256: info.KrgSHA256}
	take := func(p *partResult, names ...string) error {
		for _, name := range names {
			if err := linkOrCopy(p.path(name), filepath.Join(partial, filepath.FromSlash(name))); err != nil {
				return err
			}
			i := slices.IndexFunc(p.Artefacts, func(a Artefact) bool { return a.Path == name })
			if i < 0 {
				return fmt.Errorf("%s was not made by its part", name)
			}
			m.Artefacts = append(m.Artefacts, p.Artefacts[i])
		}
		return nil
	}
	err := errors.Join(
		take(parts.packages, BaseFile),
		take(parts.kernel, KernelFile, ModulesFile),
		take(parts.overlay, OverlayFile),
	)
	for _, name := range Loaders {
		err = errors.Join(err, take(parts.loaders, path.Join(LoaderDir, name)))
	}
	if err != nil {
		return nil, err
	}
	if err := concatenate(filepath.Join(partial, InitramfsFile), parts.members); err != nil {
		return nil, err
	}
	if err := parts.modules.read(selectionFile, &m.Initramfs); err != nil {
		return nil, err
	}
	var sets [][]Package
	for _, p := range []*partResult{parts.packages, parts.kernel, parts.firmware, parts.loaders} {
		var list []Package
		if err := p.read(packagesFile, &list); err != nil {
			return nil, err
		}
		sets = append(sets, list)
	}
	m.Packages = len(sets[0])
	if err := writeSBOM(filepath.Join(partial, SBOMFile), o, info, slices.Concat(sets...)); err != nil {
		return nil, err
	}
	for _, name := range []string{InitramfsFile, SBOMFile} {
		a, err := describe(partial, name)
		if err != nil {
			return nil, err
		}
		m.Artefacts = append(m.Artefacts, a)
	}
	slices.SortFunc(m.Artefacts, func(a, b Artefact) int { return strings.Compare(a.Path, b.Path) })
	if err := writeJSON(filepath.Join(partial, ManifestFile), m); err != nil {
		return nil, err
	}
	if err := errors.Join(ctx.Err(), syncTree(partial)); err != nil {
		return nil, err
	}
	final := filepath.Join(store, info.BuildID)
	if err := replaceDir(partial, final); err != nil {
		return nil, err
	}
	previous, err := os.Readlink(currentLink(o.State))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err := renameio.Symlink(info.BuildID, currentLink(o.State)); err != nil {
		return nil, fmt.Errorf("switch to the new image: %w", err)
	}
	if err := pruneImages(store, info.BuildID, previous); err != nil {
		return nil, fmt.Errorf("remove old images: %w", err)
	}
	return open(final)
}

func (im *Image) size(name string) int64 {
	for _, a := range im.Manifest.Artefacts {
		if a.Path == name {
			return a.Size
		}
	}
	return 0
}

// pruneImages keeps the current image and the one before it.
func pruneImages(store string, keep ...string) error {
	entries, err := os.ReadDir(store)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() && !slices.Contains(keep, e.Name()) {
			if err := os.RemoveAll(filepath.Join(store, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

func concatenate(file string, members []*partResult) error {
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	defer out.Close()
	for _, m := range members {
		in, err := os.Open(m.path(memberFile))
		if err != nil {
			return err
		}
		_, err = io.Copy(out, in)
		if err := errors.Join(err, in.Close()); err != nil {
			return err
		}
	}
	return out.Close()
}

// linkOrCopy gives a file a second name, or a copy where the file system has no
// hard links.
func linkOrCopy(from, to string) error {
	if os.Link(from, to) == nil {
		return nil
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

func digestsOf(parts []*partResult) []map[string]string {
	var all []map[string]string
	for _, p := range parts {
		all = append(all, p.digests())
	}
	return all
}

func hexDigest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}
