package live

import (
	"bufio"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/renameio/v2"

	"krgimage/nfsroot/meta"
)

// What people changed in a root is found by comparing it with the list of files
// that was written when the root was made. It answers two questions at a
// switch: which packages were installed by hand, and what else is left behind.

// writeFileList writes one line a file of the tree: its stamp, a blank, its path.
func writeFileList(ctx context.Context, root meta.Root, file string) error {
	pending, err := renameio.NewPendingFile(file, renameio.WithTempDir(filepath.Dir(file)), renameio.WithStaticPermissions(0o600))
	if err != nil {
		return err
	}
	defer pending.Cleanup()
	z := gzip.NewWriter(pending)
	w := bufio.NewWriter(z)
	err = fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
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
		_, err = fmt.Fprintf(w, "%s %q\n", stamp(info), name)
		return err
	})
	if err := errors.Join(err, w.Flush(), z.Close()); err != nil {
		return err
	}
	return pending.CloseAtomicallyReplace()
}

// stamp tells whether a file was changed: type and mode, and for what has
// content its size and time.
func stamp(info fs.FileInfo) string {
	if info.IsDir() {
		return info.Mode().String()
	}
	return fmt.Sprintf("%s,%d,%d", info.Mode(), info.Size(), info.ModTime().Unix())
}

func readFileList(file string) (map[string]string, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return nil, err
	}
	list := map[string]string{}
	lines := bufio.NewScanner(z)
	for lines.Scan() {
		stamp, quoted, _ := strings.Cut(lines.Text(), " ")
		var name string
		if _, err := fmt.Sscanf(quoted, "%q", &name); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		list[name] = stamp
	}
	return list, lines.Err()
}

// ordinary are trees and files that change by themselves, are ours, or have no
// meaning in another root.
var ordinary = []string{
	"proc", "sys", "dev", "run", "tmp", "lost+found", "etc/krgimage",
	"var/tmp", "var/cache", "var/log", "var/lib/apt", "var/lib/dpkg", "var/lib/systemd", "var/lib/misc",
	"usr/lib/modules", "boot",
	"etc/passwd", "etc/shadow", "etc/group", "etc/gshadow", "etc/passwd-", "etc/shadow-", "etc/group-", "etc/gshadow-",
	"etc/.pwd.lock", "etc/hosts", "etc/ld.so.cache", "etc/resolv.conf", "etc/machine-id", "etc/mtab",
}

// compare finds what the switch leaves behind: packages and paths. The full list
// of paths goes to FROM.changes.
func (s *syncer) compare(ctx context.Context, j *journal) error {
	old, err := s.trees.OpenRoot(j.From)
	if err != nil {
		return err
	}
	defer old.Close()
	rec, err := s.record(j.From)
	if err != nil {
		return err
	}
	next, err := s.record(j.To)
	if err != nil {
		return err
	}
	now, err := installed(old)
	if err != nil {
		// A dpkg database that people broke must not hold an upgrade up.
		j.Report.Conflicts = append(j.Report.Conflicts, fmt.Sprintf("packages installed by hand are not known: %v", err))
	}
	byHand := map[string]bool{} // packages
	for _, name := range now {
		if !slices.Contains(rec.Packages, name) {
			byHand[name] = true
			if !slices.Contains(next.Packages, name) {
				j.Report.Packages = append(j.Report.Packages, name)
			}
		}
	}
	made, err := readFileList(filepath.Join(s.dir, j.From+".files.gz"))
	if err != nil {
		j.Report.Conflicts = append(j.Report.Conflicts, "files changed by hand are not known: the list of the old root's files is missing")
		return nil
	}
	skip := map[string]bool{}
	for _, names := range [][]string{ordinary, j.Paths, rec.OverlayFiles} {
		for _, name := range names {
			skip[name] = true
		}
	}
	for name := range byHand {
		for _, file := range packageFiles(old, name) {
			skip[file] = true
		}
	}
	parents := map[string]bool{"etc/ssh": true} // of skipped paths
	for name := range skip {
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			parents[dir] = true
		}
	}
	err = fs.WalkDir(old.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		known, there := made[name]
		if skip[name] {
			// A directory of a package by hand may have other files too.
			if d.IsDir() && (slices.Contains(ordinary, name) || slices.Contains(j.Paths, name)) {
				return fs.SkipDir
			}
			return nil
		}
		if strings.HasPrefix(path.Base(name), ".krgimage-new-") || strings.HasPrefix(name, "etc/ssh/ssh_host_") {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return nil
		}
		if there && known == stamp(info) {
			return nil
		}
		if d.IsDir() && !there {
			if parents[name] {
				return nil // it was made for what is skipped in it
			}
			j.Report.Changes = append(j.Report.Changes, "/"+name)
			return fs.SkipDir // its name stands for all in it
		}
		j.Report.Changes = append(j.Report.Changes, "/"+name)
		return nil
	})
	if err != nil {
		return err
	}
	text := strings.Join(j.Report.Changes, "\n") + "\n"
	return renameio.WriteFile(filepath.Join(s.dir, j.From+".changes"), []byte(text), 0o600)
}

// packageFiles are the paths that dpkg installed for a package.
func packageFiles(root meta.Root, name string) []string {
	var files []string
	lists, _ := fs.Glob(root.FS(), "var/lib/dpkg/info/"+name+"*.list")
	for _, list := range lists {
		if base := strings.TrimSuffix(path.Base(list), ".list"); base != name && !strings.HasPrefix(base, name+":") {
			continue
		}
		text, err := root.ReadFile(list)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(text)) {
			file := strings.TrimPrefix(strings.TrimSpace(line), "/")
			files = append(files, file)
			// dpkg's lists may name paths by the links of merged-/usr.
			if top, _, _ := strings.Cut(file, "/"); top == "bin" || top == "sbin" || top == "lib" || top == "lib64" {
				files = append(files, "usr/"+file)
			}
		}
	}
	return files
}
