package images

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"krgimage/configs"
	"krgimage/images/progress"
	"krgimage/nfsroot/debian"
)

// DebianSource takes an image's parts from a Debian mirror. It asks the mirror
// nothing before the first part is really needed, so a build in which nothing
// changed works without a network.
type DebianSource struct {
	cluster configs.Cluster
	options debian.Options
	epoch   time.Time
	relay   *progress.Reporter
	repo    *debian.Repo // nil until needed
}

// NewDebianSource prepares the source; cacheDir keeps packages between builds,
// state gets apt's own files. Close it after the build.
func NewDebianSource(c configs.Cluster, cacheDir, state string, epoch time.Time, log *slog.Logger) *DebianSource {
	relay := progress.NewRelay()
	return &DebianSource{cluster: c, epoch: epoch, relay: relay, options: debian.Options{
		Suite: c.Debian.Suite, Mirror: c.Debian.Mirror, Security: c.Debian.Security, Components: c.Debian.Components,
		CacheDir: cacheDir, WorkDir: filepath.Join(state, "debian"), Progress: relay, Log: log,
	}}
}

// Close ends the downloads.
func (s *DebianSource) Close() error {
	if s.repo == nil {
		return nil
	}
	return s.repo.Close()
}

// sourceVersion changes when this file makes something else of the same packages.
const sourceVersion = 1

// Inputs implements Source.
func (s *DebianSource) Inputs() any { return []any{sourceVersion, debian.BasePackages()} }

// open starts the repository at first use and points its reports at the step.
func (s *DebianSource) open(ctx context.Context, step *progress.Step) (*debian.Repo, error) {
	s.relay.Into(step)
	if s.repo != nil {
		return s.repo, nil
	}
	for _, check := range debian.Preflight(s.cluster.Debian.Suite) {
		if !check.OK {
			return nil, fmt.Errorf("this machine can't build yet: %s: %s; %s", check.Name, check.Why, check.Fix)
		}
	}
	repo, err := debian.Open(ctx, s.options)
	s.repo = repo
	return repo, err
}

// Base implements Source.
func (s *DebianSource) Base(ctx context.Context, dst string, step *progress.Step) ([]Package, error) {
	repo, err := s.open(ctx, step)
	if err != nil {
		return nil, err
	}
	base, err := repo.Bootstrap(ctx, debian.BootstrapOptions{Packages: s.cluster.Debian.Packages, Epoch: s.epoch}, filepath.Join(dst, BaseFile))
	if err != nil {
		return nil, err
	}
	var list []Package
	for _, p := range base.Packages {
		list = append(list, Package{Name: p.Name, Version: p.Version, Arch: p.Arch})
	}
	return list, nil
}

// Kernel implements Source.
func (s *DebianSource) Kernel(ctx context.Context, dst string, step *progress.Step) (Kernel, []Package, error) {
	repo, err := s.open(ctx, step)
	if err != nil {
		return Kernel{}, nil, err
	}
	tree := filepath.Join(dst, strings.Split(ModulesTree, "/")[0])
	k, err := repo.Kernel(ctx, s.cluster.Kernel.Flavour, tree)
	if err != nil {
		return Kernel{}, nil, err
	}
	err = errors.Join(
		os.Rename(k.Vmlinuz, filepath.Join(dst, KernelFile)),
		debian.ModulesTar(ctx, k, s.epoch, filepath.Join(dst, ModulesFile), step),
	)
	return Kernel{Release: k.Release, Package: k.Package.Name, Version: k.Package.Version},
		[]Package{{Name: k.Package.Name, Version: k.Package.Version, Arch: k.Package.Arch}}, err
}

// Firmware implements Source.
func (s *DebianSource) Firmware(ctx context.Context, dst string, step *progress.Step) ([]Package, error) {
	if len(s.cluster.Initramfs.Firmware) == 0 {
		return nil, nil
	}
	tmp := dst + ".deb"
	defer os.RemoveAll(tmp)
	firmware := func(name string) bool { return strings.HasPrefix(strings.TrimPrefix(name, "usr/"), "lib/firmware/") }
	list, err := s.unpack(ctx, s.cluster.Initramfs.Firmware, firmware, tmp, step)
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{"usr/lib/firmware", "lib/firmware"} {
		if from := filepath.Join(tmp, dir); isDir(from) {
			return list, errors.Join(os.Remove(dst), os.Rename(from, dst))
		}
	}
	return nil, fmt.Errorf("the packages %s have no firmware in them", strings.Join(s.cluster.Initramfs.Firmware, " "))
}

// loaderPackages are the Debian packages that hold Loaders.
var loaderPackages = []string{"ipxe", "pxelinux", "syslinux-common"}

// loaderFiles are the paths of Loaders in those packages.
var loaderFiles = []string{
	"usr/lib/ipxe/undionly.kpxe", "usr/lib/ipxe/ipxe.pxe", "usr/lib/ipxe/snponly.efi", "usr/lib/PXELINUX/pxelinux.0", "usr/lib/syslinux/modules/bios/ldlinux.c32",
}

// Loaders implements Source.
func (s *DebianSource) Loaders(ctx context.Context, dst string, step *progress.Step) ([]Package, error) {
	tmp := dst + ".deb"
	defer os.RemoveAll(tmp)
	list, err := s.unpack(ctx, loaderPackages, func(name string) bool { return slices.Contains(loaderFiles, name) }, tmp, step)
	if err != nil {
		return nil, err
	}
	for _, file := range loaderFiles {
		if err := os.Rename(filepath.Join(tmp, file), filepath.Join(dst, path.Base(file))); err != nil {
			return nil, fmt.Errorf("no %s in Debian's boot loader packages: %w", file, err)
		}
	}
	return list, nil
}

// unpack downloads packages and takes the matching files of each into dst.
func (s *DebianSource) unpack(ctx context.Context, names []string, match func(string) bool, dst string, step *progress.Step) ([]Package, error) {
	repo, err := s.open(ctx, step)
	if err != nil {
		return nil, err
	}
	files, err := repo.Download(ctx, names)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dst, 0o755); err != nil {
		return nil, err
	}
	var list []Package
	for _, f := range files {
		step.Note("unpack %s", f.Name)
		if err := debian.ExtractDeb(ctx, f.Path, match, dst); err != nil {
			return nil, fmt.Errorf("unpack %s: %w", f.Name, err)
		}
		list = append(list, Package{Name: f.Name, Version: f.Version, Arch: f.Arch, SHA256: f.SHA256})
	}
	return list, nil
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}
