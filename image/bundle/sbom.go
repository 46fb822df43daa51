package bundle

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"os/exec"
	"slices"
	"strings"

	cdx "github.com/CycloneDX/cyclonedx-go"

	"clonecluster/image"
)

// sbom is the manifest's list of what is in the image in the form that other
// tools read: CycloneDX. It has neither a time nor a serial number, so it is the
// same for the same image.
func sbom(m *image.Manifest) ([]byte, error) {
	bom := cdx.NewBOM()
	bom.SerialNumber = ""
	name := "clonecluster-" + m.Board
	bom.Metadata = &cdx.Metadata{Component: &cdx.Component{BOMRef: name, Type: cdx.ComponentTypeFirmware, Name: name, Version: version(m)}}
	var parts []cdx.Component
	add := func(c cdx.Component) {
		if !slices.ContainsFunc(parts, func(o cdx.Component) bool { return o.BOMRef == c.BOMRef }) {
			parts = append(parts, c)
		}
	}
	if k := m.Kernel; k != nil {
		c := cdx.Component{BOMRef: "linux", Type: cdx.ComponentTypeOS, Name: "linux", Version: k.Version, Hashes: sha256Of(k.SHA256)}
		if k.Package != "" {
			c.PackageURL = "pkg:deb/debian/" + k.Package + "@" + k.Version + "?arch=source"
		}
		var patches []cdx.Patch
		for _, p := range k.Inputs.Patches {
			file, _, _ := strings.Cut(p, " ")
			patches = append(patches, cdx.Patch{Type: cdx.PatchTypeUnofficial, Diff: &cdx.Diff{URL: "image/kernel/patches/" + file}})
		}
		if len(patches) > 0 {
			c.Pedigree = &cdx.Pedigree{Patches: &patches}
		}
		add(c)
	}
	for _, p := range m.Packages {
		purl := "pkg:deb/debian/" + p.Name + "@" + p.Version
		add(cdx.Component{BOMRef: purl, Type: cdx.ComponentTypeFirmware, Name: p.Name, Version: p.Version, PackageURL: purl})
	}
	modules := slices.Clone(m.Modules)
	versions := []string{m.Go}
	for _, s := range m.Services {
		modules = append(modules, s.Modules...)
		if s.Go != "" {
			versions = append(versions, s.Go)
		}
	}
	for _, v := range versions {
		purl := "pkg:golang/std@" + strings.TrimPrefix(v, "go")
		add(cdx.Component{BOMRef: purl, Type: cdx.ComponentTypeLibrary, Name: "std", Version: v, PackageURL: purl})
	}
	for _, mod := range modules {
		purl := "pkg:golang/" + mod.Path + "@" + mod.Version
		c := cdx.Component{BOMRef: purl, Type: cdx.ComponentTypeLibrary, Name: mod.Path, Version: mod.Version, PackageURL: purl}
		// go.sum's "h1:" is the SHA-256 of a list of the module's files.
		if b, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(mod.Sum, "h1:")); err == nil && len(b) == 32 {
			c.Hashes = sha256Of(hex.EncodeToString(b))
		}
		add(c)
	}
	for _, f := range m.Outputs {
		kind := cdx.ComponentTypeFile
		if strings.HasPrefix(f.Name, "/") {
			kind = cdx.ComponentTypeApplication
		}
		add(cdx.Component{BOMRef: "file:" + f.Name, Type: kind, Name: f.Name, Version: "sha256:" + f.SHA256, Hashes: sha256Of(f.SHA256)})
	}
	slices.SortFunc(parts, func(a, b cdx.Component) int { return strings.Compare(a.BOMRef, b.BOMRef) })
	bom.Components = &parts
	var buf bytes.Buffer
	if err := cdx.NewBOMEncoder(&buf, cdx.BOMFileFormatJSON).SetPretty(true).Encode(bom); err != nil {
		return nil, fmt.Errorf("writing the SBOM: %w", err)
	}
	return buf.Bytes(), nil
}

// version stands for the whole: there are no releases yet.
func version(m *image.Manifest) string {
	for _, f := range m.Outputs {
		if f.Name == InitrdName {
			return "sha256:" + f.SHA256
		}
	}
	return ""
}

func sha256Of(hexsum string) *[]cdx.Hash {
	return &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: hexsum}}
}

// debianPackage asks dpkg for the version of the first of the names that is
// installed, and calls it by the last.
func debianPackage(names ...string) image.Package {
	for _, n := range names {
		if out, err := exec.Command("dpkg-query", "-W", "-f", "${Version}", n).Output(); err == nil && len(out) > 0 {
			return image.Package{Name: names[len(names)-1], Version: string(out)}
		}
	}
	return image.Package{Name: names[len(names)-1], Version: "unknown"}
}
