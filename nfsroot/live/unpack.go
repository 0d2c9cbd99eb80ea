package live

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"

	"krgimage/images/progress"
	"krgimage/nfsroot/debian"
	"krgimage/nfsroot/debian/space"
	"krgimage/nfsroot/debian/tarfs"
	"krgimage/nfsroot/meta"
)

// keepReleases is how many kernels' modules stay in a root: the new one's and
// that of nodes which have not rebooted yet.
const keepReleases = 2

// unpack makes a new tree of the image and returns its name. The tree gets its
// name when it is complete and on disk.
func (s *syncer) unpack(ctx context.Context, step *progress.Step) (id string, err error) {
	image := s.in.Image
	id, err = s.newID(plainDigest(image.Base.Digest))
	if err != nil {
		return "", err
	}
	partial := id + ".partial"
	if err := s.trees.Mkdir(partial, 0o755); err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			// A full disk has to be measured before the partial tree goes.
			err = space.Explain(err, "the live root is unpacked", s.dir, unpackedSize(image))
			// The error says why; what remains goes at the next Sync.
			for _, left := range []string{partial, id + ".json", id + ".files.gz"} {
				s.trees.RemoveAll(left)
			}
		}
	}()
	rec := record{
		Base:    plainDigest(image.Base.Digest),
		Modules: plainDigest(image.Modules.Digest),
		Overlay: plainDigest(image.Overlay.Digest),
		Users:   []string{},
	}
	releases, overlay := &releaseList{}, &fileList{}
	for _, part := range []struct {
		what string
		from Artefact
		opt  tarfs.Options
	}{
		{"Debian root", image.Base, tarfs.Options{Owner: true, Kept: s.kept, NoXattr: s.loose}},
		{"kernel modules", image.Modules, tarfs.Options{Owner: true, Kept: s.kept, NoXattr: s.loose, Replace: true, Seen: releases.seen}},
		{"overlay", image.Overlay, tarfs.Options{Owner: true, Kept: s.kept, NoXattr: s.loose, Replace: true, Seen: overlay.seen}},
	} {
		step.Note("unpacking the %s", part.what)
		if err := extract(ctx, step, part.from, filepath.Join(s.dir, partial), part.opt); err != nil {
			return "", fmt.Errorf("%s: %w", part.what, err)
		}
	}
	rec.Releases, rec.OverlayFiles = releases.names, overlay.names
	root, err := s.trees.OpenRoot(partial)
	if err != nil {
		return "", err
	}
	defer root.Close()
	if err := pristine(root, s.in.Cluster); err != nil {
		return "", err
	}
	if rec.Packages, err = installed(root); err != nil {
		return "", err
	}
	if err := writeFileList(ctx, root, filepath.Join(s.dir, id+".files.gz")); err != nil {
		return "", err
	}
	if err := s.writeRecord(id, rec); err != nil {
		return "", err
	}
	step.Note("writing to disk")
	if err := flush(s.dir); err != nil {
		return "", err
	}
	return id, s.trees.Rename(partial, id)
}

// unpackedSize estimates the bytes that an image takes on disk: a Debian root
// shrinks to a fifth under zstd, modules are compressed before.
func unpackedSize(image Image) int64 {
	var total int64
	for _, part := range []struct {
		from   Artefact
		factor int64
	}{{image.Base, 5}, {image.Modules, 1}, {image.Overlay, 1}} {
		if info, err := os.Stat(part.from.Path); err == nil {
			total += info.Size() * part.factor
		}
	}
	return total
}

// update puts new modules and a new overlay into the live tree in place: each
// file is written aside and renamed over the old one.
func (s *syncer) update(ctx context.Context, step *progress.Step, id string, rec record) (Report, error) {
	image := s.in.Image
	modules, overlay := plainDigest(image.Modules.Digest), plainDigest(image.Overlay.Digest)
	if rec.Modules == modules && rec.Overlay == overlay {
		return Report{Action: "unchanged"}, nil
	}
	root, err := s.trees.OpenRoot(id)
	if err != nil {
		return Report{}, err
	}
	defer root.Close()
	dir := filepath.Join(s.dir, id)
	// Until both are in place the record says that they are not.
	before := rec.OverlayFiles
	rec.Overlay = ""
	if err := s.writeRecord(id, rec); err != nil {
		return Report{}, err
	}
	if rec.Modules != modules {
		step.Note("kernel modules")
		list := &releaseList{}
		if err := extract(ctx, step, image.Modules, dir, tarfs.Options{Owner: true, Kept: s.kept, NoXattr: s.loose, Replace: true, Seen: list.seen}); err != nil {
			return Report{}, fmt.Errorf("kernel modules: %w", err)
		}
		rec.Modules = modules
		rec.Releases = slices.DeleteFunc(rec.Releases, func(r string) bool { return slices.Contains(list.names, r) })
		rec.Releases = append(rec.Releases, list.names...)
	}
	step.Note("overlay")
	list := &fileList{}
	if err := extract(ctx, step, image.Overlay, dir, tarfs.Options{Owner: true, Kept: s.kept, NoXattr: s.loose, Replace: true, Seen: list.seen}); err != nil {
		return Report{}, fmt.Errorf("overlay: %w", err)
	}
	for _, name := range before {
		if !slices.Contains(list.names, name) {
			// Only files: a directory may have other things in it by now.
			if info, err := root.Lstat(name); err == nil && !info.IsDir() {
				if err := root.Remove(name); err != nil {
					return Report{}, err
				}
			}
		}
	}
	for len(rec.Releases) > keepReleases {
		if err := root.RemoveAll(path.Join("usr/lib/modules", rec.Releases[0])); err != nil {
			return Report{}, err
		}
		rec.Releases = rec.Releases[1:]
	}
	if err := flush(s.dir); err != nil {
		return Report{}, err
	}
	rec.Overlay, rec.OverlayFiles = overlay, list.names
	return Report{Action: "updated"}, s.writeRecord(id, rec)
}

// releaseList collects the kernel releases of a modules archive.
type releaseList struct{ names []string }

func (l *releaseList) seen(name string) {
	if rest, ok := strings.CutPrefix(name, "usr/lib/modules/"); ok {
		release, _, _ := strings.Cut(rest, "/")
		if release != "" && !slices.Contains(l.names, release) {
			l.names = append(l.names, release)
		}
	}
}

type fileList struct{ names []string }

func (l *fileList) seen(name string) { l.names = append(l.names, name) }

// errDamaged is an artefact that is not what its digest says.
var errDamaged = errors.New("the file is damaged: it does not have the digest that the image's manifest gives\n  fix: build the image again")

// extract unpacks an artefact into dir and checks its digest on the way.
func extract(ctx context.Context, step *progress.Step, from Artefact, dir string, opt tarfs.Options) error {
	f, err := os.Open(from.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	sum := sha256.New()
	in := bufio.NewReaderSize(io.TeeReader(f, io.MultiWriter(sum, step.Writer(io.Discard, info.Size()))), 256<<10)
	var archive io.Reader = in
	if magic, _ := in.Peek(4); bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}) { // RFC 8878 §3.1.1
		z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1))
		if err != nil {
			return err
		}
		defer z.Close()
		archive = z
	}
	extractErr := tarfs.Extract(ctx, archive, dir, opt)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	// The rest counts for the digest, and a wrong digest explains any error.
	if _, err := io.Copy(io.Discard, in); err != nil {
		return err
	}
	if want := plainDigest(from.Digest); want != "" && hex.EncodeToString(sum.Sum(nil)) != want {
		return fmt.Errorf("%s: %w", from.Path, errDamaged)
	}
	if extractErr != nil {
		return fmt.Errorf("%s: %w", from.Path, extractErr)
	}
	return nil
}

// installed are the names of a root's installed packages.
func installed(root meta.Root) ([]string, error) {
	status, err := root.ReadFile("var/lib/dpkg/status")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	packages, err := debian.ParseStatus(bytes.NewReader(status))
	if err != nil {
		return nil, fmt.Errorf("var/lib/dpkg/status: %w", err)
	}
	var names []string
	for _, p := range packages {
		names = append(names, p.Name)
	}
	return slices.Compact(names), nil
}
