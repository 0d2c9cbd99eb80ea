// Package tarfs moves trees between tar archives and directories: Extract
// unpacks what a package or an image artefact holds, Write packs a directory so
// that the same files always give the same bytes.
//
// Archives are outside input. Nothing is ever written outside the directory
// given: names that leave it are refused, and the kernel resolves every name
// below the directory's descriptor (os.Root), so a symbolic link inside an
// archive cannot lead out either.
package tarfs

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/nfsroot/meta"
)

// ErrUnsafe marks an archive entry whose name leaves the tree.
var ErrUnsafe = errors.New("archive entry leaves the tree")

// xattrPrefix is how GNU tar, bsdtar and Go name extended attributes in pax
// records.
const xattrPrefix = "SCHILY.xattr."

// Options tune Extract. The zero value unpacks everything as the caller's own
// files into a tree where none of them exists yet.
type Options struct {
	// Match chooses entries by clean name ("usr/bin/env"); nil takes all.
	Match func(name string) bool
	// Owner keeps uid, gid, device nodes and extended attributes, which takes
	// root. Without it devices are left out and setuid bits are cleared.
	Owner bool
	// Kept is Owner without root: it takes a directory that is the top of a
	// tree whose owners are kept in attributes (package meta), and has no
	// attributes of the kernel's.
	Kept bool
	// Replace puts each entry in the place of what is there, file by file:
	// written aside, then renamed over. Directories that are there keep their
	// owner and mode.
	Replace bool
	// Seen is told each clean name that was unpacked; may be nil.
	Seen func(name string)
	// NoXattr leaves out extended attributes, which an NFS mount doesn't keep.
	NoXattr bool
}

// Clean returns an entry's name as a clean relative path, "." for the top, or
// ErrUnsafe.
func Clean(name string) (string, error) {
	if strings.ContainsRune(name, 0) {
		return "", fmt.Errorf("%w: %q", ErrUnsafe, name)
	}
	clean := path.Clean("./" + strings.TrimLeft(name, "/"))
	if !filepath.IsLocal(clean) {
		return "", fmt.Errorf("%w: %q", ErrUnsafe, name)
	}
	return clean, nil
}

// Extract unpacks the archive into dir, which must exist.
func Extract(ctx context.Context, r io.Reader, dir string, opt Options) error {
	root, err := meta.Open(dir, opt.Kept)
	if err != nil {
		return err
	}
	defer root.Close()
	opt.Owner = opt.Owner || opt.Kept
	x := extractor{root: root, opt: opt}
	archive := tar.NewReader(r)
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		hdr, err := archive.Next()
		if err == io.EOF {
			return x.finish()
		}
		if err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
		name, err := Clean(hdr.Name)
		if err != nil {
			return err
		}
		if opt.Match != nil && !opt.Match(name) {
			continue
		}
		if err := x.entry(name, hdr, archive); err != nil {
			return fmt.Errorf("unpack %s: %w", name, err)
		}
		if opt.Seen != nil {
			opt.Seen(name)
		}
	}
}

type extractor struct {
	root meta.Root
	opt  Options
	dirs []dirTime
}

// dirTime is set when all else is written: creating an entry changes its
// directory's time.
type dirTime struct {
	name  string
	mtime time.Time
}

func (x *extractor) finish() error {
	for i := len(x.dirs) - 1; i >= 0; i-- {
		d := x.dirs[i]
		if err := x.root.Chtimes(d.name, d.mtime, d.mtime); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (x *extractor) entry(name string, hdr *tar.Header, body io.Reader) error {
	if parent := path.Dir(name); parent != "." {
		if err := x.root.MkdirAll(parent, 0o755); err != nil {
			return err
		}
	}
	switch hdr.Typeflag {
	case tar.TypeDir:
		return x.directory(name, hdr)
	case tar.TypeReg:
		return x.place(name, func(at string) error { return x.regular(at, hdr, body) })
	case tar.TypeSymlink:
		return x.place(name, func(at string) error {
			if err := x.root.Symlink(hdr.Linkname, at); err != nil {
				return err
			}
			if x.opt.Owner {
				return x.root.Lchown(at, hdr.Uid, hdr.Gid)
			}
			return nil
		})
	case tar.TypeLink:
		target, err := Clean(hdr.Linkname)
		if err != nil {
			return err
		}
		return x.place(name, func(at string) error { return x.root.Link(target, at) })
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		if !x.opt.Owner {
			return nil
		}
		return x.place(name, func(at string) error { return x.node(at, hdr) })
	case tar.TypeXGlobalHeader:
		return nil
	}
	return fmt.Errorf("entry of unknown type %q", hdr.Typeflag)
}

// place makes an entry under its own name, or, when replacing, under a name
// aside that is then renamed over.
func (x *extractor) place(name string, write func(at string) error) error {
	if !x.opt.Replace {
		return write(name)
	}
	aside := path.Join(path.Dir(name), ".krgimage-new-"+path.Base(name))
	if err := x.root.RemoveAll(aside); err != nil {
		return err
	}
	if err := write(aside); err != nil {
		x.root.RemoveAll(aside)
		return err
	}
	if err := x.root.Rename(aside, name); err != nil {
		x.root.RemoveAll(aside)
		return err
	}
	// rename(2) of two names of one inode does nothing and leaves both.
	if err := x.root.Remove(aside); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (x *extractor) directory(name string, hdr *tar.Header) error {
	if name != "." {
		err := x.root.Mkdir(name, 0o700)
		if errors.Is(err, fs.ErrExist) {
			// A link to a directory stays a link, as dpkg has it: /lib is
			// one on merged-/usr systems.
			info, statErr := x.root.Stat(name)
			switch {
			case statErr != nil:
				return statErr
			case info.IsDir():
				// Nor does a directory that is there change, as dpkg has it.
				if link, err := x.root.Lstat(name); err != nil || link.Mode()&fs.ModeSymlink != 0 || x.opt.Replace {
					return err
				}
			case x.opt.Replace:
				if err := x.root.Remove(name); err != nil {
					return err
				}
				if err := x.root.Mkdir(name, 0o700); err != nil {
					return err
				}
			default:
				return err
			}
		} else if err != nil {
			return err
		}
	}
	if name == "." && x.opt.Replace {
		return nil
	}
	x.dirs = append(x.dirs, dirTime{name, hdr.ModTime})
	return x.attributes(name, hdr)
}

func (x *extractor) regular(at string, hdr *tar.Header, body io.Reader) error {
	f, err := x.root.OpenFile(at, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	if _, err := io.Copy(f, body); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := x.attributes(at, hdr); err != nil {
		return err
	}
	return x.root.Chtimes(at, hdr.ModTime, hdr.ModTime)
}

func (x *extractor) node(at string, hdr *tar.Header) error {
	kind := map[byte]uint32{tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK, tar.TypeFifo: unix.S_IFIFO}[hdr.Typeflag]
	device := unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor))
	if err := x.root.Mknod(at, kind|0o600, device); err != nil {
		return err
	}
	return x.attributes(at, hdr)
}

// attributes sets owner, then mode (chown clears setuid), then extended
// attributes (chown clears capabilities).
func (x *extractor) attributes(at string, hdr *tar.Header) error {
	mode := hdr.FileInfo().Mode() & (fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky)
	if !x.opt.Owner {
		if hdr.Typeflag == tar.TypeDir {
			mode |= 0o700 // or its contents could not follow
		}
		return x.root.Chmod(at, mode&^(fs.ModeSetuid|fs.ModeSetgid))
	}
	if err := x.root.Lchown(at, hdr.Uid, hdr.Gid); err != nil {
		return err
	}
	if err := x.root.Chmod(at, mode); err != nil {
		return err
	}
	if x.opt.NoXattr {
		return nil
	}
	for _, key := range slices.Sorted(maps.Keys(hdr.PAXRecords)) {
		attr, ok := strings.CutPrefix(key, xattrPrefix)
		if !ok {
			continue
		}
		if err := x.root.SetXattr(at, attr, []byte(hdr.PAXRecords[key])); err != nil {
			return fmt.Errorf("the file system keeps no attribute %s: %w", attr, err)
		}
	}
	return nil
}

// Header returns hdr as it goes into a reproducible archive: numeric owners,
// no access or change time, no time after epoch, whole seconds, of the pax
// records only extended attributes.
func Header(hdr *tar.Header, epoch time.Time) *tar.Header {
	h := *hdr
	h.Uname, h.Gname = "", ""
	h.AccessTime, h.ChangeTime = time.Time{}, time.Time{}
	h.ModTime = h.ModTime.Truncate(time.Second)
	if h.ModTime.After(epoch) {
		h.ModTime = epoch
	}
	h.PAXRecords = nil
	for key, value := range hdr.PAXRecords {
		if strings.HasPrefix(key, xattrPrefix) {
			if h.PAXRecords == nil {
				h.PAXRecords = map[string]string{}
			}
			h.PAXRecords[key] = value
		}
	}
	h.Format = tar.FormatUnknown
	return &h
}

// Write packs dir's contents below the names prefix/..., sorted, owned by root,
// all times epoch. Parents of prefix are not entered. It takes directories,
// regular files and symbolic links.
func Write(ctx context.Context, w *tar.Writer, dir, prefix string, epoch time.Time) error {
	return filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, file)
		if err != nil {
			return err
		}
		link := ""
		if info.Mode()&fs.ModeSymlink != 0 {
			if link, err = os.Readlink(file); err != nil {
				return err
			}
		}
		hdr, err := tar.FileInfoHeader(info, link)
		if err != nil {
			return err
		}
		hdr.Name = path.Join(prefix, filepath.ToSlash(rel))
		if info.IsDir() {
			hdr.Name += "/"
		}
		hdr.Uid, hdr.Gid, hdr.ModTime = 0, 0, epoch
		if err := w.WriteHeader(Header(hdr, epoch)); err != nil {
			return err
		}
		if !info.Mode().IsRegular() {
			return nil
		}
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(w, f)
		return err
	})
}
