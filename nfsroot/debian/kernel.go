package debian

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"github.com/klauspost/compress/zstd"

	"krgimage/images/progress"
	"krgimage/nfsroot/debian/space"
	"krgimage/nfsroot/debian/tarfs"
)

// Kernel is Debian's signed kernel, unpacked.
type Kernel struct {
	Package Package // linux-image-VERSION-FLAVOUR
	Release string  // uname -r, "6.12.117+deb13-amd64"
	Vmlinuz string  // file
	Modules string  // directory ROOT/usr/lib/modules/RELEASE, with depmod's indexes
	Root    string  // depmod's base directory: has usr/lib/modules, and lib as a link to usr/lib
}

// Kernel fetches linux-image-FLAVOUR, follows it to the exact signed kernel
// package, and unpacks that one's vmlinuz and modules into dst, which it makes
// anew: dst/vmlinuz and dst/root/usr/lib/modules/RELEASE. The modules stay
// compressed as Debian has them.
func (r *Repo) Kernel(ctx context.Context, flavour, dst string) (Kernel, error) {
	k, err := r.kernel(ctx, flavour, dst)
	if err != nil {
		os.RemoveAll(dst)
		err = fmt.Errorf("kernel: %w", space.Explain(err, "the kernel is unpacked", dst, 300<<20))
	}
	return k, err
}

func (r *Repo) kernel(ctx context.Context, flavour, dst string) (Kernel, error) {
	names, err := r.kernelPackages(ctx, flavour)
	if err != nil {
		return Kernel{}, err
	}
	files, err := r.Download(ctx, names)
	if err != nil {
		return Kernel{}, err
	}
	step := r.opt.Progress.Step("Kernel")
	fail := func(err error) (Kernel, error) { return Kernel{}, step.Fail(err) }
	if err := os.RemoveAll(dst); err != nil {
		return fail(err)
	}
	root := filepath.Join(dst, "root")
	if err := os.MkdirAll(filepath.Join(root, "usr", "lib"), 0o755); err != nil {
		return fail(err)
	}
	// Debian 12's kmod looks in lib/modules, later ones in usr/lib/modules.
	if err := os.Symlink("usr/lib", filepath.Join(root, "lib")); err != nil {
		return fail(err)
	}
	for _, file := range files {
		step.Note("unpacking %s", file.Name)
		err := ExtractDeb(ctx, file.Path, func(name string) bool {
			return strings.HasPrefix(name, "boot/vmlinuz-") ||
				strings.HasPrefix(name, "usr/lib/modules/") || strings.HasPrefix(name, "lib/modules/")
		}, root)
		if err != nil {
			return fail(err)
		}
	}
	k := Kernel{Package: files[0].Package, Root: root, Vmlinuz: filepath.Join(dst, "vmlinuz")}
	images, _ := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*"))
	if len(images) != 1 {
		return fail(fmt.Errorf("%s has %d kernels in /boot, one was expected", k.Package.Name, len(images)))
	}
	k.Release = strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-")
	k.Modules = filepath.Join(root, "usr", "lib", "modules", k.Release)
	if err := os.Rename(images[0], k.Vmlinuz); err != nil {
		return fail(err)
	}
	if err := os.Remove(filepath.Join(root, "boot")); err != nil {
		return fail(err)
	}
	step.Note("depmod %s", k.Release)
	if err := r.depmod(ctx, root, k.Release); err != nil {
		return fail(err)
	}
	step.Done("%s", k.Release)
	return k, nil
}

// kernelPackages follows the flavour's meta package to the packages that hold
// the kernel and, where they are apart, its modules.
func (r *Repo) kernelPackages(ctx context.Context, flavour string) ([]string, error) {
	r.apt.Lock()
	defer r.apt.Unlock()
	if err := r.update(ctx); err != nil {
		return nil, err
	}
	meta, err := r.index.newest("linux-image-" + flavour)
	if err != nil {
		return nil, fmt.Errorf("%w (kernel.flavour is %q)", err, flavour)
	}
	var image string
	for _, name := range meta.depends {
		if strings.HasPrefix(name, "linux-image-") {
			image = name
		}
	}
	if image == "" {
		return nil, fmt.Errorf("%s %s depends on no kernel package", meta.Name, meta.Version)
	}
	if strings.HasSuffix(image, "-unsigned") {
		return nil, fmt.Errorf("%s %s depends on an unsigned kernel: %s", meta.Name, meta.Version, image)
	}
	names := []string{image}
	e, err := r.index.newest(image)
	if err != nil {
		return nil, err
	}
	for _, name := range e.depends {
		if strings.HasPrefix(name, "linux-modules-") {
			names = append(names, name)
		}
	}
	return names, nil
}

func (r *Repo) depmod(ctx context.Context, root, release string) error {
	program, err := findTool("depmod")
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, program, "-b", root, release)
	cmd.Env = cleanEnv()
	stopGently(cmd)
	out, err := cmd.CombinedOutput()
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil && space.InLog(out):
		return space.Full("the modules are indexed", root, 20<<20)
	case err != nil:
		return fmt.Errorf("depmod: %w\n%s", err, lastLines(out, 4))
	}
	// depmod has been seen to exit 0 without having written on a full disk.
	info, err := os.Stat(filepath.Join(root, "usr", "lib", "modules", release, "modules.dep"))
	if err != nil || info.Size() == 0 {
		if free, freeErr := space.Free(root); freeErr == nil && free < 20<<20 {
			return space.Full("the modules are indexed", root, 20<<20)
		}
		return errors.New("depmod wrote no modules.dep")
	}
	return nil
}

// ModulesTar packs a kernel's modules as usr/lib/modules/RELEASE/... into out, a
// zstd-compressed archive. The same kernel and epoch give the same bytes.
func ModulesTar(ctx context.Context, k Kernel, epoch time.Time, out string, step *progress.Step) error {
	return writeArchive("the modules are packed", out, 120<<20, step, func(w io.Writer) error {
		archive := tar.NewWriter(w)
		if err := tarfs.Write(ctx, archive, k.Modules, "usr/lib/modules/"+k.Release, epoch); err != nil {
			return err
		}
		return archive.Close()
	})
}

// writeArchive writes a zstd-compressed file aside and renames it to out when
// it is complete and on disk. step counts the compressed bytes; it may be nil.
// A full disk is explained while it still is full: doing is the step in words,
// needed the bytes that the file takes, about.
func writeArchive(doing, out string, needed int64, step *progress.Step, fill func(io.Writer) error) (err error) {
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return err
	}
	pending, err := renameio.NewPendingFile(out, renameio.WithTempDir(filepath.Dir(out)), renameio.WithStaticPermissions(0o644))
	if err != nil {
		return err
	}
	defer pending.Cleanup()
	defer func() { err = space.Explain(err, doing, filepath.Dir(out), needed) }()
	var sink io.Writer = pending
	if step != nil {
		sink = step.Writer(pending, 0)
	}
	// One goroutine: the block boundaries, and so the bytes, must not depend
	// on the number of processors.
	z, err := zstd.NewWriter(sink, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedDefault))
	if err != nil {
		return err
	}
	if err := fill(z); err != nil {
		z.Close()
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	return pending.CloseAtomicallyReplace()
}
